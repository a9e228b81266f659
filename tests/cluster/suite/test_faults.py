"""What is promised when something fails: traffic between running pods never stops, and new pods recover without a
hand."""
import json, subprocess as sp, time, unittest

import cluster, mesh
from mesh import NAMESPACE, deploy, deployment, kubectl, pod_of, run_in, wait, web
from suite.test_operator import countersign
from suite.test_traffic import Load

# A request after the other, each over a connection of its own; one line each.
ENDLESS = """
import http.client, time
n = 0
while True:
    try:
        c = http.client.HTTPConnection("web", 8080, timeout=15); c.request("GET", "/")
        assert c.getresponse().read() == b"ok"
        n += 1; print("ok", n, flush=True)
    except Exception as e:
        print("failed", time.time(), repr(e), flush=True)
    time.sleep(0.05)
"""


class Faults(unittest.TestCase):
    def under_load(self, ns, break_it):
        deploy(ns, web(replicas=2), deployment("client", ["sleep", "infinity"]))
        load = Load(ns, pod_of(ns, "client"), "web", 8080)
        break_it()
        made, failed = load.end()
        self.assertEqual(failed, [])
        self.assertGreater(made, 100)

    def new_pod_works(self, ns):
        deploy(ns, web("fresh"))
        mesh.reached(ns, pod_of(ns, "client"), "http://fresh:8080/")

    def cluster_follows(self, client):
        """Waits until DNS and every kube-proxy have a new namespace's Service. After an outage each watch of
        Kubernetes' own programs comes back in its own time, of up to a minute. What runs next must not have to wait for
        that, so they begin anew."""
        for program in ("coredns", "kube-controller-manager", "kube-scheduler"):
            cluster.NODES[0].restart(program)
        for node in cluster.NODES:
            node.restart("kube-proxy")
        with mesh.namespace("since") as ns:
            kubectl("-n", ns, "create", "service", "clusterip", "since", "--tcp=8080")
            resolve = ["python3", "-c", f"import socket; socket.gethostbyname('since.{ns}.svc.cluster.local')"]
            wait("the cluster's DNS", lambda: run_in(*client, *resolve, check=False).returncode == 0, 90)
            for node in cluster.NODES:
                rules = lambda: node.run("iptables-save", stdout=sp.PIPE, check=True).stdout
                wait(f"{node.name}'s kube-proxy", lambda: f"{ns}/since:" in rules(), 90)

    def test_agent_pods_deleted(self):
        with mesh.namespace("no-agent") as ns:
            def break_it():
                mesh.delete_pods(NAMESPACE, "-l", "app.kubernetes.io/component=agent")
                mesh.ready()
                time.sleep(2)
            self.under_load(ns, break_it)
            self.new_pod_works(ns)

    def test_server_pod_deleted(self):
        with mesh.namespace("no-server") as ns:
            def break_it():
                mesh.delete_pods(NAMESPACE, "countersign-server-0")
                mesh.ready()
                time.sleep(2)
            self.under_load(ns, break_it)
            self.new_pod_works(ns)

    def test_of_two_registrars_one_works_and_the_other_takes_over_when_it_hangs(self):
        server = mesh.get("-n", NAMESPACE, "statefulset",
                          "countersign-server")["spec"]["template"]["spec"]["containers"]
        second = next(c for c in server if c["name"] == "registrar")
        second = {**second, "name": "second", "env": [{"name": "POD_NAME", "value": "second"}], "ports": [],
                  "readinessProbe": None, "livenessProbe": None,
                  "args": [a.replace("9465", "9466") for a in second["args"]]}
        change = lambda step: kubectl("-n", NAMESPACE, "patch", "statefulset", "countersign-server", "--type=json",
                                      "-p", json.dumps([step]))
        change({"op": "add", "path": "/spec/template/spec/containers/-",
                "value": {k: v for k, v in second.items() if v is not None}})
        try:
            mesh.ready()
            lease = lambda: mesh.get("-n", NAMESPACE, "lease", "countersign-registrar")["spec"]
            containers = {"countersign-server-0": "registrar", "second": "second"}
            began = lease()["renewTime"]
            holder = wait("one of them to hold the lease",
                          lambda: (l := lease())["renewTime"] > began and l["holderIdentity"], 40)
            other = next(name for name in containers if name != holder)
            registered = lambda name, ns: f"/ns/{ns}/" in mesh.logs(NAMESPACE, "countersign-server-0", containers[name])
            with mesh.namespace("one-works") as ns, mesh.namespace("other-works") as later:
                deploy(ns, web())
                self.assertEqual((registered(holder, ns), registered(other, ns)), (True, False))
                pod = mesh.get("-n", NAMESPACE, "pod", "countersign-server-0")
                wanted = next(c["containerID"].split("//")[1] for c in pod["status"]["containerStatuses"]
                              if c["name"] == containers[holder])
                node = mesh.node_of(pod["spec"]["nodeName"])
                tasks = node.run("ctr", "-n", "k8s.io", "task", "ls", stdout=sp.PIPE, check=True).stdout
                pid = next(line.split()[1] for line in tasks.splitlines() if line.startswith(wanted))
                node.run("kill", "-STOP", pid, check=True)
                try:
                    deploy(later, web(), timeout=60)
                    self.assertEqual(lease()["holderIdentity"], other)
                    self.assertTrue(registered(other, later))
                finally:
                    node.run("kill", "-CONT", pid, check=True)
                log = (NAMESPACE, "countersign-server-0", containers[holder])
                wait("the first to see that it leads no more", lambda: "the lease is lost" in mesh.logs(*log), 30)
        finally:
            change({"op": "remove", "path": f"/spec/template/spec/containers/{len(server)}"})
            mesh.ready()

    def test_a_permission_that_was_taken_away_is_named_and_given_back_all_works(self):
        roles = ("clusterrolebinding/countersign-agent", "clusterrolebinding/countersign-server")
        with mesh.namespace("no-permission") as ns:
            deploy(ns, web(replicas=2), deployment("client", ["sleep", "infinity"]))
            pod = mesh.get("-n", NAMESPACE, "pod", "countersign-server-0")
            registrar = next(c["containerID"].split("//")[1] for c in pod["status"]["containerStatuses"]
                             if c["name"] == "registrar")
            server = mesh.node_of(pod["spec"]["nodeName"])
            kubectl("delete", *roles)
            try:
                # Both start anew, so that nobody waits for the end of a watch that was allowed.
                tasks = server.run("ctr", "-n", "k8s.io", "task", "ls", stdout=sp.PIPE, check=True).stdout
                server.run("kill", next(line.split()[1] for line in tasks.splitlines() if line.startswith(registrar)))
                mesh.delete_pods(NAMESPACE, mesh.agent_on("node2"))
                agents = lambda: mesh.pods(NAMESPACE, "app.kubernetes.io/component=agent")
                agent = wait("the next agent", lambda: next((p["metadata"]["name"] for p in agents()
                                                             if p["spec"].get("nodeName") == "node2"), None), 20)
                forbidden = lambda *page: "pods is forbidden" in (text := mesh.pod_page(*page)) and text
                wait("the registrar to name the permission",
                     lambda: forbidden("countersign-server-0", 9465, "/ready"), 30)
                said = wait("the agent to name the permission",
                            lambda: forbidden(agent, 9464, "/ready"), 30)
                self.assertIn("cannot list resource", said)
                checks = lambda: json.loads(countersign("check", "--output", "json").stdout)["checks"]
                source = lambda: next(c for c in checks() if c["check"] == "pod source")
                found = wait("check to name it", lambda: not (c := source())["ok"] and c, 10)
                self.assertIn("on node2 no source of pods works", found["found"])
                self.assertIn("pods is forbidden", found["found"])
                # The server's pod is not ready, and agents still reach it.
                wait("the agent to hear the server", lambda: "the server has not been heard" not in
                     mesh.pod_page(agent, 9464, "/ready"), 20)
            finally:
                mesh.install()
            self.new_pod_works(ns)

    def test_injectors_deleted(self):
        with mesh.namespace("no-injector") as ns:
            def break_it():
                mesh.delete_pods(NAMESPACE, "-l", "app.kubernetes.io/component=injector")
                mesh.ready()
            self.under_load(ns, break_it)
            self.new_pod_works(ns)

    def inside_load(self, ns, break_it, least):
        """As `under_load`, but the requests are a pod's own work: `kubectl exec` would end with what is broken here."""
        deploy(ns, web(replicas=2), deployment("client", ["python3", "-c", ENDLESS]))
        client = pod_of(ns, "client")
        told = lambda: (mesh.logs(ns, client, "app", check=False).stdout or "").splitlines()
        wait("the load", lambda: len(told()) > 10, 30)
        break_it()
        wait("the load to go on", lambda: len(told()) > least, 60)
        self.assertEqual([line for line in told() if not line.startswith("ok ")], [])

    def test_the_api_server_is_away_for_a_minute(self):
        with mesh.namespace("no-api") as ns:
            def break_it():
                cluster.NODES[0].stop("kube-apiserver")
                try:
                    time.sleep(60)
                finally:
                    cluster.NODES[0].start("kube-apiserver")
                wait("the API server", lambda: kubectl("get", "--raw", "/readyz", check=False).returncode == 0, 60)
            # The cluster's DNS answers from memory meanwhile; the mesh must not add a failure.
            self.inside_load(ns, break_it, 600)
            self.cluster_follows((ns, pod_of(ns, "client")))
            self.new_pod_works(ns)

    def test_kubelets_restarted(self):
        with mesh.namespace("no-kubelet") as ns:
            def break_it():
                for node in cluster.NODES:
                    node.restart("kubelet")
                time.sleep(15)
                ready = lambda: kubectl("get", "nodes", "-o",
                                        "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}").split()
                wait("the nodes", lambda: ready() == ["True"] * len(cluster.NODES), 60)
            self.inside_load(ns, break_it, 200)
            self.new_pod_works(ns)
