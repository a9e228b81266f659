#!/usr/bin/env python3
"""How long from `entry create` returning to the SVID in the agent's cache, over N entries (default 1,000).

  propagation.py [N]     with `images/build` done; COUNTERSIGN names another binary.
Server and agent run as processes on loopback in a temporary folder. The agent logs when an SVID is ready.
"""
import json, os, re, subprocess as sp, sys, tempfile, time
from datetime import datetime

N = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HOST = re.search(r"host: (\S+)", sp.run(["rustc", "-vV"], check=True, stdout=sp.PIPE, text=True).stdout)[1]
BIN = os.environ.get("COUNTERSIGN", os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")),
                                                 HOST, "release", "countersign"))

def seconds(text):
    return datetime.fromisoformat(text[:26].rstrip("Z") + "+00:00").timestamp()

with tempfile.TemporaryDirectory() as d:
    at = lambda n: os.path.join(d, n)
    env = dict(os.environ, COUNTERSIGN_SERVER_SOCKET=at("server.sock"))
    cli = lambda *a: sp.run([BIN, *a], env=env, check=True, stdout=sp.PIPE, text=True).stdout
    procs = [sp.Popen([BIN, "server", "--trust-domain", "bench.local", "--bind", "127.0.0.1:0", "--socket",
                       at("server.sock"), "--data-dir", at("server"), "--ready-file", at("ready"), "--log", "warn"])]
    try:
        while not os.path.exists(at("ready")): time.sleep(0.02)
        open(at("bundle.pem"), "w").write(cli("bundle", "show"))
        token = json.loads(cli("token", "generate", "-o", "json"))["token"]
        open(at("token"), "w").write(token)
        log = open(at("agent.log"), "w")
        procs.append(sp.Popen([BIN, "agent", "--trust-domain", "bench.local", "--server",
                               open(at("ready")).read().strip(), "--socket", at("agent.sock"),
                               "--data-dir", at("agent"), "--trust-bundle", at("bundle.pem"), "--join-token-file",
                               at("token"), "--log",
                               "info,countersign_agent=debug", "--log-format", "json"], stderr=log))
        while "attested" not in open(at("agent.log")).read(): time.sleep(0.02)
        returned = {}
        for n in range(N):
            out = json.loads(cli("entry", "create", "-o", "json", "--spiffe-id", f"spiffe://bench.local/w/{n}",
                                 "--parent-id",
                                 f"spiffe://bench.local/spire/agent/join_token/{token}", "--selector",
                                 f"unix:uid:{n + 100000}"))
            returned[out[0]["id"]] = time.time()
        deadline = time.time() + 10
        while True:
            ready = {}
            for line in open(at("agent.log")):
                try: event = json.loads(line)
                except ValueError: continue
                if event.get("fields", {}).get("message") == "SVID ready":
                    ready.setdefault(event["fields"]["entry"], seconds(event["timestamp"]))
            if len(ready) >= N or time.time() > deadline: break
            time.sleep(0.1)
        # The command's own exit takes a few milliseconds: an SVID may be ready before it has returned.
        late = sorted((ready[i] - t) * 1000 for i, t in returned.items() if i in ready)
        q = lambda p: late[min(len(late) - 1, int(len(late) * p))]
        print(f"{len(late)} of {N} SVIDs ready; milliseconds after `entry create` returned: p50 {q(.5):.1f}"
              f"  p99 {q(.99):.1f}  max {late[-1]:.1f}")
    finally:
        for p in procs: p.terminate()
        for p in procs: p.wait()
