"""The redirect by the CNI plugin: no pod needs NET_ADMIN, whatever rewrites a node's files or is down meanwhile."""
import json, re, subprocess as sp, time, unittest

import cluster, mesh
from mesh import NAMESPACE, deploy, deployment, get, kubectl, pod_of, pods, run_in, wait
from suite.test_csi import CONFINED

PLUGIN = "countersign-cni"
CONF, BIN, SOCKET = "/etc/cni/net.d", "/opt/cni/bin", "/run/countersign/cni/cni.sock"
ON = "cni.enabled=true"
# What the namespace's level asks of an app's container.
SECURITY = f"securityContext: {json.dumps(CONFINED)}"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


def files(node):
    """The node's network configurations, whole, and the names of its plugins."""
    shown = node.run("sh", "-c", f"cd {CONF} && for f in *; do stat -c '%n %a' $f; cat $f; done; ls {BIN}",
                     stdout=sp.PIPE, check=True)
    return shown.stdout


def conflist(node):
    return node.dir / "cni.d" / "10-bridge.conflist"


def types(node):
    return [plugin["type"] for plugin in json.loads(conflist(node).read_text())["plugins"]]


def process(node, pod, container, of="containerStatuses"):
    """A container's process, by its number on the node."""
    status = next(c for c in pod["status"][of] if c["name"] == container)
    name = status["containerID"].split("//")[1]
    tasks = node.run("ctr", "-n", "k8s.io", "task", "ls", stdout=sp.PIPE, check=True).stdout
    return next(line.split()[1] for line in tasks.splitlines() if line.startswith(name))


def component(node):
    return process(node, get("-n", NAMESPACE, "pod", mesh.agent_on(node.name)), "cni")


def page(node, path="/metrics"):
    return mesh.pod_page(mesh.agent_on(node.name), 9467, path)


def redirect(pod):
    """What `redirect --check` says in a pod's namespace of exactly the rules that its sidecar asks for."""
    assert [c["name"] for c in pod["spec"]["initContainers"]] == ["countersign-proxy"], "nothing installs or validates"
    args = pod["spec"]["initContainers"][0]["args"]
    flags = next(arg.removeprefix("--redirect=") for arg in args if arg.startswith("--redirect=")).split(" ")
    node = mesh.node_of(pod["spec"]["nodeName"])
    flags = [flag for flag in flags if flag != "--by-cgroup" or node.by_cgroup]
    resolvers = ["--resolvers=10.89.0.1"] if "--other-protocols=drop" in flags else []
    return node.run("nsenter", "-t", process(node, pod, "app"), "-n", mesh.binary(), "redirect", "--check", *flags,
                    *resolvers, stdout=sp.PIPE, stderr=sp.STDOUT)


def confined(name, command, node=None, **options):
    spec = f"nodeName: {node}" if node else ""
    return deployment(name, command, container=SECURITY, spec=spec, **options)


class Cni(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.before = {n.name: files(n).replace(f"{PLUGIN}\n", "") for n in cluster.NODES}
        cls.addClassCleanup(cls.back)
        # The first step: the nodes get the plugin, and pods do not wait for it.
        mesh.install(ON, "injector.cniRedirect=false")
        old = cls.namespace("cni-old")
        deploy(old, mesh.web(), deployment("client", ["sleep", "infinity"]))
        agents = [mesh.agent_on(n.name) for n in cluster.NODES]
        mesh.install(ON)
        assert agents == [mesh.agent_on(n.name) for n in cluster.NODES], "the second step restarts no agent"

    @classmethod
    def back(cls):
        """As the others have it."""
        mesh.install()
        kubectl("-n", NAMESPACE, "delete", "role,rolebinding", "countersign-agent", "--ignore-not-found")

    @classmethod
    def namespace(cls, name, **options):
        held = mesh.namespace(name, **options)
        cls.addClassCleanup(held.__exit__, None, None, None)
        return held.__enter__()

    def restricted(self, name):
        ns = self.namespace(name, mode="strict")
        kubectl("label", "namespace", ns, RESTRICTED)
        return ns

    def test_1_strict_services_call_each_other_in_a_restricted_namespace_without_any_capability(self):
        ns = self.restricted("cni-restricted")
        deploy(ns, confined("web", ["bash", "-c", mesh.NGINX], port=8080, replicas=2),
               *(confined(f"client-{n.name}", ["sleep", "infinity"], node=n.name) for n in cluster.NODES))
        for n in cluster.NODES:
            mesh.reached(ns, pod_of(ns, f"client-{n.name}"), "http://web:8080/")
        with mesh.capture() as seen:
            for n in cluster.NODES:
                canary = f"canary-of-{n.name}"
                said = run_in(ns, pod_of(ns, f"client-{n.name}"), "curl", "-sSf", "-m", "10", "-H", f"x: {canary}",
                              "http://web:8080/")
                self.assertEqual((said, seen(canary)), ("ok", False))
        self.assertEqual(get("-n", ns, "events", "--field-selector=reason=FailedCreate")["items"], [])
        for pod in pods(ns, "app"):
            for container in pod["spec"]["initContainers"] + pod["spec"]["containers"]:
                self.assertEqual(container["securityContext"]["capabilities"], {"drop": ["ALL"]}, container["name"])
                self.assertTrue(container["securityContext"]["runAsNonRoot"], container["name"])
            self.assertFalse([v for v in pod["spec"]["volumes"] if "hostPath" in v])
            checked = redirect(pod)
            self.assertEqual(checked.returncode, 0, checked.stdout)
            caught = re.search(r"rest to 15001\s+(\d+)", checked.stdout)
            if pod["metadata"]["labels"]["app"].startswith("client"):
                self.assertGreater(int(caught[1]), 0, checked.stdout)
        for n in cluster.NODES:
            self.assertIn('answer="in_force"', page(n))
            self.assertEqual(types(n)[-1], PLUGIN)

    def test_1_an_app_that_becomes_the_sidecars_user_is_caught_where_containers_have_cgroups_of_version_2(self):
        bare, ns = self.namespace("cni-outside", inject=False), self.namespace("cni-setuid", mode="strict")
        deploy(bare, deployment("open", ["python3", "-m", "http.server", "8000"], port=8000))
        outside = get("-n", bare, "pod", pod_of(bare, "open"))["status"]["podIP"]
        # Root with Kubernetes' usual capabilities, in a process of the app's own container.
        program = f"""
import os, socket, time
os.setuid(2102)
while True:
    try: socket.create_connection(("{outside}", 8000), 2).close(); print("reached", flush=True)
    except OSError as e: print("caught:", e, flush=True)
    time.sleep(0.3)
"""
        deploy(ns, mesh.web(), deployment("client", ["sleep", "infinity"], spec=f"nodeName: {cluster.NODES[1].name}"),
               *(deployment(f"sly-{n.name}", ["python3", "-c", program], spec=f"nodeName: {n.name}",
                            container="securityContext: {runAsUser: 0}") for n in cluster.NODES))
        for n in cluster.NODES:
            pod = pod_of(ns, f"sly-{n.name}")
            said = wait("a few tries", lambda: (lines := mesh.logs(ns, pod, "app").splitlines())[4:] and lines, 30)
            # Where they have none, the user ID is all that there is.
            self.assertEqual({line.split(":")[0] for line in said}, {"caught" if n.by_cgroup else "reached"}, said)
            answer = "admitted" if n.by_cgroup else "by_user"
            self.assertRegex(page(n), rf'(?m)^countersign_cni_sidecars_total{{answer="{answer}"}} [1-9]')
        # The sidecar's own connections pass, also those of one that was started again.
        client, node = pod_of(ns, "client"), cluster.NODES[1]
        call = lambda: run_in(ns, client, "curl", "-sS", "-m", "5", "http://web:8080/", check=False)
        self.assertEqual(call().stdout, "ok")
        sidecar = lambda: process(node, get("-n", ns, "pod", client), "countersign-proxy", "initContainerStatuses")
        node.run("kill", "-9", first := sidecar(), check=True)
        restarts = lambda: get("-n", ns, "pod", client)["status"]["initContainerStatuses"][0]["restartCount"]
        wait("the sidecar to be started again", restarts, 30)
        wait("its connections to pass", lambda: call().stdout == "ok", 30)
        self.assertNotEqual(sidecar(), first)

    def test_1_an_app_that_is_given_the_socket_is_not_taken_for_the_sidecar(self):
        ns, node = self.namespace("cni-socket", mode="strict"), cluster.NODES[1]
        image = get("-n", NAMESPACE, "pod", mesh.agent_on(node.name))["spec"]["containers"][0]["image"]
        ports = [f"--{door}-port={port}" for door, port in (("outbound", 16001), ("inbound", 16006), ("mesh", 16008))]
        spy = {"name": "spy", "image": image, "imagePullPolicy": "Never", "securityContext": {"runAsUser": 1000},
               "args": ["proxy", "--agent-socket=/a/agent.sock", "--cni-socket=/a/sidecars.sock", "--http=[::]:16020",
                        *ports],
               "volumeMounts": [{"name": "api", "mountPath": "/a", "readOnly": True}]}
        kubectl("-n", ns, "apply", "-f", "-", input=json.dumps({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "sly"}, "spec": {
                "nodeName": node.name, "containers": [spy],
                "volumes": [{"name": "api", "csi": {"driver": "csi.countersign.dev", "readOnly": True}}]}}))
        refused = "the caller is not in container countersign-proxy"
        wait("the refusal", lambda: refused in mesh.logs(ns, "sly", "spy", check=False).stdout, 60)
        self.assertIn('countersign_cni_sidecars_total{answer="refused"}', page(node))

    def test_2_what_another_tool_rewrites_comes_back_and_an_update_leaves_no_gap(self):
        node = cluster.NODES[0]
        extended = conflist(node).read_text()
        other = json.loads(extended)
        other["plugins"] = [p for p in other["plugins"] if p["type"] != PLUGIN]
        conflist(node).write_text(json.dumps(other, indent=1))
        node.run("rm", f"{BIN}/{PLUGIN}", check=True)
        wait("the plugin to be back", lambda: types(node)[-1] == PLUGIN and PLUGIN in files(node), 5)
        for what in ("configuration", "binary"):
            wait(f"the count of {what}", lambda: f'countersign_cni_restored_total{{what="{what}"}} 1' in page(node), 5)
        kubectl("-n", NAMESPACE, "rollout", "restart", "daemonset/countersign-agent")
        done = lambda: kubectl("-n", NAMESPACE, "rollout", "status", "daemonset/countersign-agent", "--timeout=1s",
                               check=False).returncode == 0
        end = time.monotonic() + 120
        while not done():
            self.assertLess(time.monotonic(), end)
            for n in cluster.NODES:
                self.assertEqual(types(n)[-1], PLUGIN)
                self.assertIn(PLUGIN, files(n))
        mesh.ready()
        # As it was, but for the plugin: the other tool's last word.
        conflist(node).write_text(extended)

    def test_3_while_the_component_is_down_only_meshed_pods_wait(self):
        node = cluster.NODES[1]
        plain, ns = self.namespace("cni-plain", inject=False), self.restricted("cni-waits")
        pid = component(node)
        node.run("kill", "-STOP", pid, check=True)
        try:
            for name in (plain, ns):
                kubectl("-n", name, "apply", "-f", "-", input=confined("app", ["sleep", "infinity"], node=node.name))
            kubectl("-n", plain, "rollout", "status", "deployment/app", "--timeout=40s")
            of_pod = lambda: (pods(ns, "app=app") or [{"status": {}}])[0]["status"]
            sidecar = lambda: (of_pod().get("initContainerStatuses") or [{"state": {}}])[0]
            wait("the sidecar to run", lambda: "running" in sidecar()["state"], 30)
            # Nobody says that its redirect is in force.
            said = lambda: mesh.logs(ns, pod_of(ns, "app"), "countersign-proxy", check=False).stdout
            wait("the reason", lambda: "no answer within" in said(), 30)
            self.assertEqual((sidecar()["started"], sidecar()["ready"]), (False, False))
            self.assertIn("waiting", of_pod()["containerStatuses"][0]["state"])
        finally:
            node.run("kill", "-CONT", pid)
        kubectl("-n", ns, "rollout", "status", "deployment/app", "--timeout=60s")
        self.assertEqual(redirect(pods(ns, "app=app")[0]).returncode, 0)

    def test_3_a_pod_that_the_plugin_could_not_announce_is_repaired(self):
        node, ns = cluster.NODES[1], self.restricted("cni-repaired")
        node.run("mv", SOCKET, f"{SOCKET}.away", check=True)
        try:
            deploy(ns, confined("app", ["sleep", "infinity"], node=node.name))
        finally:
            node.run("mv", f"{SOCKET}.away", SOCKET)
        self.assertEqual(redirect(pods(ns, "app=app")[0]).returncode, 0)
        self.assertIn("the redirect was missing", mesh.logs(NAMESPACE, mesh.agent_on(node.name), "cni"))
        self.assertRegex(page(node), r"(?m)^countersign_cni_repairs_total [1-9]")

    def test_4_a_pod_that_was_meshed_before_goes_on(self):
        old = "cni-old"
        for pod in pods(old, "app"):
            self.assertEqual(pod["spec"]["initContainers"][0]["securityContext"]["capabilities"]["add"], ["NET_ADMIN"])
        client = pod_of(old, "client")
        for host in ("web", "web.cni-restricted"):
            self.assertEqual(run_in(old, client, "curl", "-sSf", "-m", "10", f"http://{host}:8080/"), "ok")

    def test_5_turned_off_the_nodes_files_are_as_before_but_for_the_plugins_own(self):
        for n in cluster.NODES:
            self.assertNotEqual(files(n), self.before[n.name])
        mesh.install()
        for n in cluster.NODES:
            # The plugin's file stays for whatever still names it.
            others = lambda n=n: files(n).replace(f"{PLUGIN}\n", "")
            wait("the files of before", lambda n=n: others(n) == self.before[n.name], 20)
            self.assertIn(PLUGIN, files(n))
        # Whoever runs goes on.
        self.assertEqual(run_in("cni-old", pod_of("cni-old", "client"), "curl", "-sSf", "-m", "10",
                                "http://web.cni-restricted:8080/"), "ok")
