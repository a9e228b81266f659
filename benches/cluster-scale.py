#!/usr/bin/env python3
"""How quick and how large in a cluster: pods one by one, then many at once; from creation to entry, to ready, to the
first mTLS byte; and the memory of each role.

  benches/cluster-scale.py [--pods 200]      in a cluster that `tests/cluster/run up` brought up
"""
import argparse, datetime, pathlib, statistics, sys, time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "cluster"))
import cluster, mesh  # noqa: E402
from mesh import get, kubectl  # noqa: E402

# As soon as it starts, the app asks a meshed service and says when it was answered.
FIRST = ("import http.client,time\nwhile True:\n  try:\n"
         "    c=http.client.HTTPConnection('web.%s',8080,timeout=5); c.request('GET','/')\n"
         "    assert c.getresponse().read()==b'ok'; print('first', time.time(), flush=True); break\n"
         "  except Exception as e: print(repr(e), flush=True)\ntime.sleep(1e6)")


def parsed(stamp):
    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def is_ready(pod):
    return all(c.get("ready") for c in pod["status"].get("containerStatuses", [{}]))


def show(name, values):
    values = sorted(values)
    at = lambda q: values[min(len(values) - 1, int(q * len(values)))]
    print(f"{name:34} n={len(values):4}  min {values[0]:6.2f}  p50 {statistics.median(values):6.2f}"
          f"  p90 {at(.9):6.2f}  p99 {at(.99):6.2f}  max {values[-1]:6.2f} s")


def memory(role, selector, container):
    """Memory of a role's processes in MiB: resident, its proportional share (a page that n processes map counts 1/n),
    anonymous."""
    out = []
    for pod in mesh.pods(mesh.NAMESPACE if role != "sidecar" else "scale", selector):
        node = mesh.node_of(pod["spec"]["nodeName"])
        statuses = pod["status"]["containerStatuses"] + pod["status"].get("initContainerStatuses", [])
        wanted = next(s["containerID"].split("//")[1] for s in statuses if s["name"] == container)
        tasks = node.run("ctr", "-n", "k8s.io", "task", "ls", stdout=-1, check=True).stdout
        pid = next(l.split()[1] for l in tasks.splitlines() if l.startswith(wanted))
        status = node.run("cat", f"/proc/{pid}/smaps_rollup", stdout=-1, check=True).stdout
        field = lambda name: next(int(l.split()[1]) / 1024 for l in status.splitlines() if l.startswith(name))
        out.append([field(name) for name in ("Rss:", "Pss:", "Anonymous:")])
    shown = "  ".join(f"{name} median {statistics.median(values):5.1f} max {max(values):5.1f}"
                      for name, values in zip(("RSS", "PSS", "anonymous"), zip(*out)))
    print(f"{role:10} {len(out):4} processes, MiB: {shown}")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--pods", type=int, default=200)
    pods = flags.parse_args().pods
    with mesh.namespace("scale-web") as web_ns, mesh.namespace("scale") as ns:
        mesh.deploy(web_ns, mesh.web(replicas=2))
        began = time.time()
        app = mesh.deployment("many", ["python3", "-c", FIRST % web_ns], replicas=pods)
        kubectl("-n", ns, "apply", "-f", "-", input=app)
        mesh.wait("all pods", lambda: sum(map(is_ready, mesh.pods(ns, "app=many"))) == pods, 900)
        print(f"{pods} pods at once on {len(cluster.NODES)} nodes: all ready after {time.time() - began:.1f} s")
        found = {p["metadata"]["name"]: p for p in mesh.pods(ns, "app=many")}
        created = {n: parsed(p["metadata"]["creationTimestamp"]) for n, p in found.items()}
        registered = {}
        for line in mesh.logs(mesh.NAMESPACE, "countersign-server-0", "registrar").splitlines():
            if "pod registered" in line and f"/ns/{ns}/" in line:
                entry = line.split('entry="')[1].split('"')[0]
                registered[entry] = parsed(line.split()[0])
        entries = {o["metadata"]["name"]: o["status"]["entryId"] for o in get("-n", ns, "spiffeids")["items"]}
        show("creation to entry", [registered[entries[n]] - created[n] for n in found if entries.get(n) in registered])
        started, first = [], []
        for name, pod in found.items():
            proxy = next(c for c in pod["status"]["initContainerStatuses"] if c["name"] == "countersign-proxy")
            app_began = parsed(pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"])
            started.append(app_began - parsed(proxy["state"]["running"]["startedAt"]))
            said = mesh.wait("its first answer",
                             lambda: [l for l in mesh.logs(ns, name, "app").splitlines() if l.startswith("first ")], 60)
            first.append(float(said[0].split()[1]) - created[name])
        show("sidecar start to app start", started)
        show("creation to first mTLS byte", first)
        memory("server", "app.kubernetes.io/component=server", "server")
        memory("registrar", "app.kubernetes.io/component=server", "registrar")
        memory("injector", "app.kubernetes.io/component=injector", "injector")
        memory("agent", "app.kubernetes.io/component=agent", "agent")
        memory("sidecar", "app=many", "countersign-proxy")
    # The next run needs these names.
    kubectl("wait", "--for=delete", "namespace/scale-web", "namespace/scale", "--timeout=300s", check=False)


if __name__ == "__main__":
    main()
