#!/usr/bin/env python3
"""From a pod's creation to Ready: meshed pods beside bare ones, and beside bare ones with one init container, which
wait until the kubelet notices its end as meshed ones do with the redirect's. One pod at a time, then many at once.

  benches/pod-ready.py [--pods 20] [--at-once 20]      in a cluster that `tests/cluster/run up` brought up
  benches/pod-ready.py --set cni.enabled=true      with other settings, installed first
"""
import argparse, collections, contextlib, http.client, json, pathlib, socket, statistics, subprocess as sp, sys
import tempfile, threading, time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "cluster"))
import cluster, images, mesh  # noqa: E402
from mesh import get, kubectl  # noqa: E402

KINDS = ("bare", "init", "meshed")
# What is seen of a pod at the API server, in order.
STEPS = ("scheduled", "address known", "redirect ended", "sidecar runs", "sidecar ready", "app runs", "Ready")


class Api(http.client.HTTPConnection):
    """The API server through `kubectl proxy`, which listens on a Unix socket."""

    def __init__(self, path: str):
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


@contextlib.contextmanager
def proxied():
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/api.sock"
        proxy = sp.Popen(cluster.kubectl_command("proxy", f"--unix-socket={path}"), stdout=sp.PIPE, text=True)
        try:
            proxy.stdout.readline()
            yield path
        finally:
            proxy.terminate()
            proxy.wait()


def pod(name: str, kind: str) -> dict:
    app = {"name": "app", "image": images.BOX, "imagePullPolicy": "Never", "args": ["sleep", "infinity"]}
    spec = {"terminationGracePeriodSeconds": 1, "securityContext": {"runAsUser": 1000}, "containers": [app]}
    if kind == "init":
        spec["initContainers"] = [{**app, "name": "first", "args": ["true"]}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def done(found: dict) -> set[str]:
    """The steps that a pod has behind it."""
    status = found.get("status", {})
    init = {c["name"]: c for c in status.get("initContainerStatuses", [])}
    redirect, sidecar = init.get("countersign-redirect", {}), init.get("countersign-proxy", {})
    app = next(iter(status.get("containerStatuses", [])), {})
    seen = {
        "scheduled": "nodeName" in found["spec"],
        "address known": "podIP" in status,
        "redirect ended": "terminated" in redirect.get("state", {}),
        "sidecar runs": "running" in sidecar.get("state", {}),
        "sidecar ready": sidecar.get("started", False),
        "app runs": "running" in app.get("state", {}),
        "Ready": any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", [])),
    }
    return {step for step, is_done in seen.items() if is_done}


class Pods:
    """The pods of a namespace, and when each of their steps was seen, in seconds of the monotonic clock."""

    def __init__(self, path: str, namespace: str):
        self.path, self.url = path, f"/api/v1/namespaces/{namespace}/pods"
        self.created: dict[str, float] = {}
        self.seen: dict[str, dict[str, float]] = collections.defaultdict(dict)
        self.gone: set[str] = set()
        self.changed = threading.Condition()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        api = Api(self.path)
        api.request("GET", f"{self.url}?watch=1")
        answer = api.getresponse()
        while line := answer.readline():
            now, event = time.monotonic(), json.loads(line)
            name = event["object"]["metadata"]["name"]
            with self.changed:
                for step in done(event["object"]):
                    self.seen[name].setdefault(step, now)
                if event["type"] == "DELETED":
                    self.gone.add(name)
                self.changed.notify_all()

    def call(self, method: str, url: str, body: dict | None = None) -> None:
        api = Api(self.path)
        api.request(method, url, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        answer = api.getresponse()
        text = answer.read().decode()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {url}: {answer.status} {text}")

    def create(self, name: str, kind: str) -> None:
        self.created[name] = time.monotonic()
        self.call("POST", self.url, pod(name, kind))

    def delete(self, name: str) -> None:
        self.call("DELETE", f"{self.url}/{name}")

    def wait(self, look, seconds: int = 300) -> None:
        with self.changed:
            if not self.changed.wait_for(look, seconds):
                raise AssertionError(f"{self.url}: not within {seconds} s")

    def times(self, name: str) -> dict[str, float]:
        return {step: at - self.created[name] for step, at in self.seen[name].items()}


def table(title: str, times: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{title}: medians in seconds after the creation")
    print("  " + "".join(f"{word:>16}" for word in ("", *KINDS)))
    for step in STEPS:
        values = [[one[step] for one in times[kind] if step in one] for kind in KINDS]
        print(f"  {step:>16}" + "".join(f"{statistics.median(v):16.2f}" if v else f"{'-':>16}" for v in values))
    ready = {kind: statistics.median(one["Ready"] for one in times[kind]) for kind in KINDS}
    print(f"  meshed takes {ready['meshed'] - ready['bare']:.2f} s longer than bare,"
          f" {ready['meshed'] - ready['init']:.2f} s longer than with an init container", flush=True)


def one_by_one(pods: dict[str, Pods], count: int) -> None:
    times = {kind: [] for kind in KINDS}
    # The first of each kind warms up, and is left out.
    for n in range(count + 1):
        for kind, its in pods.items():
            name = f"one-{n}"
            its.create(name, kind)
            its.wait(lambda: "Ready" in its.seen[name])
            its.delete(name)
            its.wait(lambda: name in its.gone)
            times[kind] += [its.times(name)] if n else []
    table(f"{count} pods of each kind, one at a time", times)


def at_once(pods: dict[str, Pods], count: int) -> None:
    times = {}
    for kind, its in pods.items():
        names = [f"many-{n}" for n in range(count)]
        for name in names:
            its.create(name, kind)
        its.wait(lambda: all("Ready" in its.seen[name] for name in names), 900)
        times[kind] = [its.times(name) for name in names]
        print(f"{kind}: all ready {max(t['Ready'] for t in times[kind]):.1f} s after their creation", flush=True)
        for name in names:
            its.delete(name)
        its.wait(lambda: its.gone.issuperset(names), 300)
    table(f"{count} pods at once", times)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--pods", type=int, default=20, help="pods of each kind, one at a time [default: 20]")
    flags.add_argument("--at-once", type=int, default=20, help="pods of each kind at once; 0: none [default: 20]")
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting to install first")
    asked = flags.parse_args()
    if asked.set:
        mesh.install(*asked.set)
    with proxied() as path, contextlib.ExitStack() as stack:
        for kind in KINDS:
            stack.enter_context(mesh.namespace(f"ready-{kind}", inject=kind == "meshed"))
            mesh.wait("the namespace's CA", lambda: kubectl("-n", f"ready-{kind}", "get", "configmap",
                                                            "kube-root-ca.crt", check=False).returncode == 0)
        pods = {kind: Pods(path, f"ready-{kind}") for kind in KINDS}
        one_by_one(pods, asked.pods)
        if asked.at_once:
            at_once(pods, asked.at_once)
        for kind in KINDS:
            events = get("-n", f"ready-{kind}", "events", "--field-selector=type=Warning")["items"]
            shown = collections.Counter(e["reason"] for e in events for _ in range(e.get("count") or 1))
            print(f"warning events of {kind} pods: {dict(shown) or 'none'}")
    kubectl("wait", "--for=delete", *(f"namespace/ready-{kind}" for kind in KINDS), "--timeout=120s", check=False)


if __name__ == "__main__":
    main()
