"""Countersign in the cluster, and what its tests share: objects, commands in pods, captures, waiting."""
import contextlib, json, os, pathlib, subprocess as sp, tempfile, time

import cluster, images
from cluster import NODES, kubectl

NAMESPACE = "countersign"
TRUST_DOMAIN = "cluster.local"
# Where the server keeps its keys and database: a folder of the first node.
VOLUME = """
apiVersion: v1
kind: PersistentVolume
metadata: {name: countersign-data}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: local
  local: {path: /var/lib/countersign}
  nodeAffinity:
    required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node1]}]}]}
"""


def alone(test):
    """Marks a test that changes the mesh for all, in a module whose others run beside other modules."""
    test.alone = True
    return test


def binary():
    """The binary that the image has."""
    if "COUNTERSIGN_BINARY" in os.environ:
        return pathlib.Path(os.environ["COUNTERSIGN_BINARY"])
    host = next(l[6:] for l in sp.check_output(["rustc", "-vV"], text=True).splitlines() if l.startswith("host: "))
    target = os.environ.get("CARGO_TARGET_DIR", str(images.ROOT / "target"))
    return pathlib.Path(target) / host / "release" / "countersign"


def manifests(*settings):
    """What `install` prints. Each test names its own settings, whatever those of the test before it were."""
    args = [a for s in (f"image.name={images.COUNTERSIGN}", "image.pullPolicy=Never", "clusterName=test",
                        "server.persistence.storageClass=local", "mesh.mode=strict",
                        "mesh.allowExceptions=lists,excepted,tenant-opened", *settings) for a in ("--set", s)]
    return sp.check_output(cluster.operators(binary(), "install", "--force", *args), text=True)


def install(*settings):
    """Installs, and waits until everything is ready."""
    apply(VOLUME)
    apply(manifests(*settings))
    ready()


def ready(timeout=90):
    for what in ("statefulset/countersign-server", "daemonset/countersign-agent", "deployment/countersign-injector"):
        kubectl("-n", NAMESPACE, "rollout", "status", what, f"--timeout={timeout}s")


def apply(text):
    return kubectl("apply", "-f", "-", input=text)


def get(*args):
    return json.loads(kubectl("get", *args, "-o", "json"))


def wait(what, look, seconds=60):
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come within {seconds} s; last seen: {found!r}")
        time.sleep(0.2)


def pods(namespace, selector):
    """Running pods that are not on their way out, by name."""
    found = get("-n", namespace, "pods", "-l", selector)["items"]
    return sorted((p for p in found if not p["metadata"].get("deletionTimestamp")), key=lambda p: p["metadata"]["name"])


def delete_pods(namespace, *which):
    """Deletes pods, by name or by `-l` and a selector, and waits until they are gone. It is not kubectl that waits: it
    did so for half an hour once, for pods that others had replaced within seconds."""
    found = get("-n", namespace, "pods", *which)
    uid = lambda pod: pod["metadata"]["uid"]
    # The next pod of a StatefulSet has the same name.
    old = {*map(uid, found.get("items", [found]))}
    kubectl("-n", namespace, "delete", "pods", *which, "--wait=false")
    gone = lambda: old.isdisjoint(map(uid, get("-n", namespace, "pods")["items"]))
    wait(f"the end of pods {' '.join(which)}", gone, 120)


def logs(namespace, pod, container, **options):
    return kubectl("-n", namespace, "logs", pod, "-c", container, **options)


def run_in(namespace, pod, *command, container="app", check=True, timeout=60):
    """A command in a pod; its output."""
    return kubectl("-n", namespace, "exec", pod, "-c", container, "--", *command, check=check, timeout=timeout)


def agent_on(node):
    return next(p["metadata"]["name"] for p in pods(NAMESPACE, "app.kubernetes.io/component=agent")
                if p["spec"]["nodeName"] == node)


def agent_status(node):
    told = run_in(NAMESPACE, agent_on(node), "/countersign", "status", "--socket=/run/countersign/agent/agent.sock",
                  "--output=json", container="agent")
    return json.loads(told)


def pod_page(name, port, path, namespace=NAMESPACE):
    """A page of a pod, whatever its status, asked from its node; nothing while it does not answer."""
    pod = get("-n", namespace, "pod", name)
    url = f"http://{pod['status'].get('podIP')}:{port}{path}"
    return node_of(pod["spec"]["nodeName"]).run("curl", "-s", "-m", "5", url, stdout=sp.PIPE).stdout


def server(*command):
    """An operator's command against the server, over its Unix socket."""
    return run_in(NAMESPACE, "countersign-server-0", "/countersign", *command,
                  "--socket=/run/countersign/server/server.sock", container="server")


def node_of(name):
    return next(n for n in NODES if n.name == name)


@contextlib.contextmanager
def namespace(name, inject=True, mode=None):
    """A namespace for one test; it goes afterwards, while the next test begins."""
    label = "{countersign.dev/inject: enabled}" if inject else "{}"
    note = f"{{countersign.dev/mode: {mode}}}" if mode else "{}"
    apply(f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {label}, annotations: {note}}}")
    wait("the namespace's service account",
         lambda: kubectl("-n", name, "get", "sa", "default", check=False).returncode == 0)
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


def gone(name, seconds=90):
    """Waits until a namespace that is being deleted is gone."""
    wait(f"the end of namespace {name}",
         lambda: kubectl("get", "namespace", name, check=False).returncode != 0, seconds)


def deployment(name, command, image=images.BOX, replicas=1, port=None, labels="", spec="", container="",
               account="default", grace=1):
    """A Deployment and, with a port, its Service: nothing in it knows of the mesh."""
    service = f"""
---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{app: {name}}}, ports: [{{name: tcp, port: {port}}}]}}""" if port else ""
    ports = f"ports: [{{containerPort: {port}}}]" if port else ""
    return f"""
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}{labels}}}}}
    spec:
      serviceAccountName: {account}
      terminationGracePeriodSeconds: {grace}
      securityContext: {{runAsUser: 1000, runAsGroup: 1000}}
      {spec}
      containers:
        - name: app
          image: {image}
          imagePullPolicy: Never
          args: {json.dumps(command)}
          {ports}
          {container}{service}
"""


# An unmodified nginx that needs no root and answers `ok`; one shell command.
NGINX = ("echo 'pid /tmp/p; error_log stderr; events {} http { access_log off; client_body_temp_path /tmp/c;"
         " proxy_temp_path /tmp/x; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;"
         " server { listen 8080; location / { return 200 ok; } } }'"
         " > /tmp/n.conf; exec nginx -c /tmp/n.conf -g 'daemon off;'")


def web(name="web", replicas=1):
    """A Deployment of it, with its Service."""
    return deployment(name, ["bash", "-c", NGINX], port=8080, replicas=replicas)


def deploy(ns, *texts, timeout=90):
    kubectl("-n", ns, "apply", "-f", "-", input="\n---\n".join(texts))
    for what in kubectl("-n", ns, "get", "deployments,statefulsets", "-o", "name").split():
        kubectl("-n", ns, "rollout", "status", what, f"--timeout={timeout}s")


def pod_of(ns, app):
    return pods(ns, f"app={app}")[0]["metadata"]["name"]


def reached(ns, client, url):
    """Waits until a pod has its answer of a new Service: DNS and kube-proxy learn of it after the pods are ready."""
    ask = ["curl", "-sSf", "-m", "5", url]
    wait(f"{client} to reach {url}", lambda: run_in(ns, client, *ask, check=False).stdout == "ok", 30)


@contextlib.contextmanager
def capture(filter_="tcp"):
    """Everything on every node's bridge and link; yields a function that says whether some bytes went by."""
    running = []
    with tempfile.TemporaryDirectory() as folder:
        for n in NODES:
            for link in ("cni0", "eth0"):
                file = f"{folder}/{n.name}-{link}.pcap"
                tcpdump = sp.Popen(["nsenter", f"--net=/run/netns/{n.netns}", "tcpdump", "--immediate-mode", "-i",
                                    link, "-s", "0", "-U", "-Z", "root", "-w", file, filter_],
                                   stdout=sp.DEVNULL, stderr=sp.PIPE, text=True)
                line = tcpdump.stderr.readline()
                assert "listening" in line, line
                running.append((tcpdump, pathlib.Path(file)))

        def seen(canary):
            time.sleep(0.5)
            return any(canary.encode() in file.read_bytes() for _, file in running)
        try:
            yield seen
        finally:
            for tcpdump, _ in running:
                tcpdump.terminate()
                tcpdump.wait()
