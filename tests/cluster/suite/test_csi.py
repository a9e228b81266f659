"""The agent's folder comes into pods by the CSI driver: read-only, without hostPath, whatever restarts meanwhile."""
import json, re, subprocess as sp, unittest

import cluster, images, mesh
from mesh import NAMESPACE, TRUST_DOMAIN, deploy, deployment, get, kubectl, pod_of, pods, run_in, wait
from suite.test_repair import all_is_well, found

DRIVER = "csi.countersign.dev"
KUBELET = "/var/lib/kubelet"
# Where SPIRE's manifests mount the Workload API, and the socket that they look for.
SOCKET = "/spiffe-workload-api/spire-agent.sock"
# What Pod Security `restricted` asks of a container.
CONFINED = {"runAsNonRoot": True, "runAsUser": 1000, "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}}


def pod(name="own", node=None, security=None, **csi):
    """A pod with an inline volume, in which one container is a client and another one has a shell."""
    security = CONFINED if security is None else security
    mounted = {"volumeMounts": [{"name": "api", "mountPath": "/spiffe-workload-api", "readOnly": True}],
               "imagePullPolicy": "Never", "securityContext": security}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {**({"nodeName": node} if node else {}), "terminationGracePeriodSeconds": 1, "containers": [
                {"name": "client", "image": images.COUNTERSIGN, "args": ["x509", "watch", f"--socket={SOCKET}"],
                 **mounted},
                {"name": "app", "image": images.BOX, "args": ["sleep", "infinity"], **mounted}],
                "volumes": [{"name": "api", "csi": {"driver": DRIVER, "readOnly": True, **csi}}]}}


def start(ns, obj):
    kubectl("-n", ns, "apply", "-f", "-", input=json.dumps(obj))


def running(ns, name="own"):
    status = lambda: get("-n", ns, "pod", name)["status"]
    return wait(f"{name} to run", lambda: all(c["ready"] for c in status().get("containerStatuses", [{"ready": 0}])))


def identity(ns, name="own"):
    """What the pod gets from the Workload API; nothing while it gets nothing."""
    done = run_in(ns, name, "/countersign", "x509", "fetch", f"--socket={SOCKET}", "--output=json", container="client",
                  check=False)
    return [svid["spiffe_id"] for svid in json.loads(done.stdout)] if done.returncode == 0 else None


def left(node, uid):
    """What the node still has of a pod's volumes of ours: folders, and mounts."""
    folder = f"{KUBELET}/pods/{uid}"
    found = node.run("find", folder, "-path", "*kubernetes.io~csi*", stdout=sp.PIPE, stderr=sp.DEVNULL).stdout.split()
    mounts = node.run("cat", "/proc/self/mountinfo", stdout=sp.PIPE).stdout.splitlines()
    return found + [l for l in mounts if folder in l and "~csi" in l]


def of_driver(node):
    """The container of the driver on a node."""
    found = get("-n", NAMESPACE, "pod", mesh.agent_on(node.name))["status"]["containerStatuses"]
    return next(c for c in found if c["name"] == "csi")


def kill(node, container):
    """Kills a container without a word."""
    name = container["containerID"].split("//")[1]
    tasks = node.run("ctr", "-n", "k8s.io", "task", "ls", stdout=sp.PIPE, check=True).stdout
    node.run("kill", "-9", next(line.split()[1] for line in tasks.splitlines() if line.startswith(name)), check=True)


class Csi(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        mesh.install("agent.socketLink=spire-agent.sock")
        cls.addClassCleanup(mesh.install)

    def namespace(self, name, **options):
        held = mesh.namespace(name, **options)
        self.addCleanup(held.__exit__, None, None, None)
        return held.__enter__()

    def restricted(self, name):
        ns = self.namespace(name, inject=False)
        kubectl("label", "namespace", ns, "pod-security.kubernetes.io/enforce=restricted")
        return ns

    def test_a_restricted_pod_gets_its_identity_and_keeps_it_whatever_restarts(self):
        ns = self.restricted("csi-own")
        own = [f"spiffe://{TRUST_DOMAIN}/ns/{ns}/sa/default"]
        for node in cluster.NODES:
            start(ns, pod(node.name, node.name))
        for node in cluster.NODES:
            name = node.name
            running(ns, name)
            self.assertEqual(wait("an identity", lambda: identity(ns, name), 30), own)
            uid = get("-n", ns, "pod", name)["metadata"]["uid"]
            [mount] = [l for l in left(node, uid) if " - " in l]
            self.assertRegex(mount, r"kubernetes\.io~csi/api/mount ro,nosuid,nodev,noexec")
        # The driver is killed: the mount lives. A pod that ends afterwards leaves nothing.
        node = cluster.NODES[0]
        uid = get("-n", ns, "pod", node.name)["metadata"]["uid"]
        before = of_driver(node)["restartCount"]
        kill(node, of_driver(node))
        self.assertEqual(identity(ns, node.name), own)
        wait("the driver to be back", lambda: (d := of_driver(node))["ready"] and d["restartCount"] > before, 60)
        self.assertEqual(identity(ns, node.name), own)
        # The agent's pod is deleted, and its driver with it: the socket is another one, in the same folder.
        agent = mesh.agent_on(node.name)
        mesh.delete_pods(NAMESPACE, agent)
        mesh.ready()
        self.assertNotEqual(mesh.agent_on(node.name), agent)
        self.assertEqual(wait("the same mount to reach the new agent", lambda: identity(ns, node.name), 30), own)
        kubectl("-n", ns, "delete", "pod", node.name, "--timeout=30s")
        wait("nothing to be left", lambda: not left(node, uid), 20)
        self.assertTrue(left(cluster.NODES[1], get("-n", ns, "pod", cluster.NODES[1].name)["metadata"]["uid"]))

    def test_not_even_root_can_write_there(self):
        ns = self.namespace("csi-root", inject=False)
        start(ns, pod(security={"runAsUser": 0}))
        running(ns)
        wait("an identity", lambda: identity(ns), 30)
        folder = SOCKET.rsplit("/", 1)[0]
        replace = ("import os, socket; os.path.exists({0!r}) and os.{1}; "
                   "socket.socket(socket.AF_UNIX).bind({2!r})")
        for what in ("remove({0!r})", "rename({0!r}, {0!r} + '2')", "stat({0!r})"):
            code = replace.format(f"{folder}/agent.sock", what.format(f"{folder}/agent.sock"), f"{folder}/mine.sock")
            done = run_in(ns, "own", "python3", "-c", code, check=False)
            self.assertIn("Read-only file system", done.stderr)
        self.assertIn("Read-only", run_in(ns, "own", "touch", f"{folder}/x", check=False).stderr)
        self.assertTrue(identity(ns))

    def test_a_writable_volume_is_refused_with_what_to_write(self):
        ns = self.restricted("csi-writable")
        start(ns, pod(readOnly=False))
        refused = lambda: [e["message"] for e in get("-n", ns, "events")["items"] if "readOnly: true" in e["message"]]
        wait("an event that says it", refused, 30)
        self.assertFalse(get("-n", ns, "pod", "own")["status"].get("containerStatuses", [{}])[0].get("ready"))
        kubectl("-n", ns, "delete", "pod", "own", "--timeout=30s")

    def test_a_meshed_pod_has_no_volume_of_its_node(self):
        ns = self.namespace("csi-meshed")
        deploy(ns, mesh.web(), deployment("client", ["sleep", "infinity"]))
        volumes = pods(ns, "app=web")[0]["spec"]["volumes"]
        self.assertEqual([v for v in volumes if "hostPath" in v], [])
        [ours] = [v for v in volumes if "csi" in v]
        self.assertEqual((ours["name"], ours["csi"]["driver"], ours["csi"]["readOnly"]),
                         ("countersign-agent", DRIVER, True))
        self.assertEqual(run_in(ns, pod_of(ns, "client"), "curl", "-sSf", "-m", "10", "http://web:8080/"), "ok")

    def test_the_driver_is_known_and_the_kubelets_alone(self):
        for node in cluster.NODES:
            known = get("csinode", node.name)["spec"]["drivers"]
            self.assertEqual([(d["name"], d["nodeID"]) for d in known], [(DRIVER, node.name)])
            paths = [f"{KUBELET}/plugins/{DRIVER}", f"{KUBELET}/plugins/{DRIVER}/csi.sock",
                     f"{KUBELET}/plugins_registry/{DRIVER}-reg.sock"]
            modes = node.run("stat", "-c", "%a %U", *paths, stdout=sp.PIPE, check=True).stdout
            self.assertEqual(modes.splitlines(), ["700 root", "600 root", "600 root"])
        page = mesh.pod_page(mesh.agent_on("node1"), 9466, "/metrics")
        self.assertIsNotNone(re.search(r"^countersign_csi_registered 1$", page, re.M), page)


class HostPath(unittest.TestCase):
    """Without the driver pods mount the folder from their node."""
    def setUp(self):
        self.addCleanup(mesh.install)
        held = mesh.namespace("by-path")
        self.ns = held.__enter__()
        self.addCleanup(held.__exit__, None, None, None)

    def kind(self, app):
        """What the sidecar of an app's pod has the agent's folder by."""
        volumes = pods(self.ns, f"app={app}")[0]["spec"]["volumes"]
        return next(k for v in volumes if v["name"] == "countersign-agent" for k in v if k != "name")

    def restart(self, app):
        kubectl("-n", self.ns, "rollout", "restart", f"deployment/{app}")
        kubectl("-n", self.ns, "rollout", "status", f"deployment/{app}", "--timeout=90s")

    def works(self):
        ask = ("curl", "-sSf", "-m", "10", "http://web:8080/")
        self.assertEqual(run_in(self.ns, pod_of(self.ns, "client"), *ask), "ok")

    def test_turned_off_and_on_again_nobody_loses_the_mesh_and_who_is_left_ends_when_the_driver_is_back(self):
        deploy(self.ns, mesh.web(), deployment("client", ["sleep", "infinity"]))
        self.assertEqual((self.kind("web"), self.kind("client")), ("csi", "csi"))
        # The first step: new pods have it from their node, the others go on.
        mesh.install("injector.csiVolumes=false")
        self.assertIn("but injector.csiVolumes=false", found()["CSI driver"]["found"])
        self.restart("web")
        self.assertEqual(self.kind("web"), "hostPath")
        self.works()
        # Too early: a pod still has a volume. It goes on, and cannot end.
        mesh.install("agent.csi.enabled=false")
        left = pod_of(self.ns, "client")
        bad = wait("a finding", lambda: not (c := found()["CSI driver"])["ok"] and c, 30)
        self.assertIn(f"which can never end: {self.ns}/{left}", bad["found"])
        self.works()
        self.restart("client")
        self.works()
        state = lambda: get("-n", self.ns, "pod", left)["status"]["containerStatuses"]
        wait("its containers to end", lambda: all("terminated" in c["state"] for c in state()), 30)
        # Turned on: who runs keeps what it has, who is new gets the driver's, and who was left ends.
        mesh.install()
        wait("the end of the pod that was left",
             lambda: kubectl("-n", self.ns, "get", "pod", left, check=False).returncode != 0, 150)
        self.assertEqual((self.kind("web"), self.kind("client")), ("hostPath", "hostPath"))
        self.works()
        self.restart("web")
        self.assertEqual(self.kind("web"), "csi")
        self.works()
        all_is_well()
