"""What Services promise, seen by a meshed pod and, side by side, by one without a sidecar: the same pods answer both.
The mesh is permissive meanwhile, so that the bare pod is let in."""
import collections, json, time, unittest

import mesh
from cluster import NODES
from mesh import deploy, deployment, get, kubectl, pod_of, pods, run_in, wait

MESHED, BARE, STRICT = "rules", "rules-bare", "rules-strict"
# Answers each line with its pod, its node and the port that was called, on each port of its arguments.
WHO = r"""
import os, socketserver, sys, threading
class Who(socketserver.StreamRequestHandler):
    def handle(self):
        if self.rfile.readline():
            said = os.environ["POD"], os.environ["NODE"], self.server.server_address[1]
            self.wfile.write(("%s %s %d\n" % said).encode())
socketserver.ThreadingTCPServer.allow_reuse_address = True
servers = [socketserver.ThreadingTCPServer(("", int(port)), Who) for port in sys.argv[1:]]
threads = [threading.Thread(target=s.serve_forever) for s in servers]
[t.start() for t in threads]
"""
# Counts the answers of so many connections, one after the other.
CALL = r"""
import collections, json, socket, sys
host, port, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
said = collections.Counter()
for _ in range(number):
    try:
        with socket.create_connection((host, port), 8) as s:
            s.sendall(b"?\n")
            said[s.makefile().readline().strip() or "refused"] += 1
    except OSError:
        said["refused"] += 1
print(json.dumps(said))
"""
SEEN = """env:
            - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
            - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}"""
REFUSED = {"refused": 1}


def on(node):
    return f"nodeSelector: {{kubernetes.io/hostname: {node}}}"


def who(name, node="node1", replicas=1, ports=(8000,), container="", **options):
    """A Deployment whose pods say who they are."""
    return deployment(name, ["python3", "-c", WHO, *map(str, ports)], replicas=replicas, labels=", set: who",
                      spec=on(node), container=f"{SEEN}\n          {container}", **options)


def service(name, spec, port=80, target=8000, selector="{set: who}"):
    """A Service; `spec` is what it promises."""
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {selector}, ports: [{{name: tcp, port: {port}, targetPort: {target}}}], {spec}}}
"""


def call(ns, node, host, port=80, number=24):
    """Who answered a client on that node, and how often."""
    said = run_in(ns, pod_of(ns, f"client-{node}"), "python3", "-c", CALL, host, str(port), str(number), timeout=240)
    return collections.Counter(json.loads(said))


def by_node(said):
    nodes = collections.Counter()
    for answer, number in said.items():
        nodes[answer.split()[1] if " " in answer else answer] += number
    return nodes


def apply(ns, *texts):
    kubectl("-n", ns, "apply", "-f", "-", input="\n---\n".join(texts))


class Services(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.held = [mesh.namespace(MESHED), mesh.namespace(BARE, inject=False), mesh.namespace(STRICT, mode="strict")]
        for held in cls.held:
            held.__enter__()
            cls.addClassCleanup(held.__exit__, None, None, None)
        cls.set_mode("permissive")
        cls.addClassCleanup(cls.set_mode, "strict")
        clients = [deployment(f"client-{n.name}", ["sleep", "infinity"], spec=on(n.name)) for n in NODES]
        deploy(BARE, *clients)
        deploy(STRICT, *clients, who("who"))
        deploy(MESHED, *clients, who("one", "node1", replicas=2), who("two", "node2"))

    @staticmethod
    def set_mode(mode):
        kubectl("-n", mesh.NAMESPACE, "patch", "configmap", "countersign-mesh", "-p", f'{{"data":{{"mode":"{mode}"}}}}')

    def both(self, name, node="node1", number=24, port=80, host=None):
        """What the meshed and the bare client on a node see of a Service, once it is served."""
        name = host or f"{name}.{MESHED}.svc.cluster.local"
        for ns in (BARE, MESHED):
            wait(f"{name} from {ns}", lambda: call(ns, node, name, port, 1) != REFUSED, 30)
        return call(MESHED, node, name, port, number), call(BARE, node, name, port, number)

    def test_each_connection_goes_anywhere_without_a_promise(self):
        apply(MESHED, service("plain", ""))
        for said in self.both("plain", number=40):
            self.assertEqual(len(said), 3, said)
            self.assertEqual(sum(said.values()), 40)

    def test_session_affinity(self):
        config = lambda seconds: ("sessionAffinity: ClientIP,"
                                  f" sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}}")
        apply(MESHED, service("sticky", "sessionAffinity: ClientIP"), service("short", config(1)))
        for said in self.both("sticky"):
            self.assertEqual(list(said.values()), [24], said)
        # A session ends when it is idle for too long.
        self.both("short", number=1)
        for ns in (MESHED, BARE):
            seen = set()
            for _ in range(20):
                seen |= set(call(ns, "node1", f"short.{MESHED}", number=1))
                if len(seen) > 1:
                    break
                time.sleep(1.2)
            self.assertGreater(len(seen), 1, ns)
        # It moves when its endpoint goes, and stays with the next one.
        stuck = next(iter(call(MESHED, "node1", f"sticky.{MESHED}", number=1))).split()[0]
        mesh.delete_pods(MESHED, stuck)
        moved = call(MESHED, "node1", f"sticky.{MESHED}")
        self.assertEqual(list(moved.values()), [24], moved)
        self.assertNotIn(stuck, str(moved))
        for name in ("one", "two"):
            kubectl("-n", MESHED, "rollout", "status", f"deployment/{name}", "--timeout=60s")

    def test_internal_traffic_policy_local(self):
        apply(MESHED, service("local", "internalTrafficPolicy: Local"),
              service("elsewhere", "internalTrafficPolicy: Local", selector="{app: one}"))
        for node in ("node1", "node2"):
            meshed, bare = self.both("local", node)
            self.assertEqual(by_node(meshed), {node: 24})
            self.assertEqual(by_node(bare), {node: 24})
        self.both("elsewhere", "node1", 1)
        for ns in (MESHED, BARE):
            self.assertEqual(call(ns, "node2", f"elsewhere.{MESHED}", number=1), REFUSED, ns)

    def test_traffic_distribution(self):
        for n in NODES:
            kubectl("label", "node", n.name, f"topology.kubernetes.io/zone=z{n.number}")
            self.addCleanup(kubectl, "label", "node", n.name, "topology.kubernetes.io/zone-")
        apply(MESHED, service("zone", "trafficDistribution: PreferClose"),
              service("node", "trafficDistribution: PreferSameNode"))
        for name in ("zone", "node"):
            slices = lambda: get("-n", MESHED, "endpointslices", "-l", f"kubernetes.io/service-name={name}")["items"]
            wait(f"hints of {name}", lambda: any(e.get("hints") for s in slices() for e in s["endpoints"] or []), 30)
            for node in ("node1", "node2"):
                look = lambda: [by_node(said) for said in self.both(name, node)]
                wait(f"{name} to stay on {node}", lambda: look() == [{node: 24}, {node: 24}], 30)

    def test_endpoints_that_are_not_ready(self):
        probe = "readinessProbe: {exec: {command: [cat, /tmp/never]}}"
        apply(MESHED, who("unready", container=probe).replace("set: who", "set: unready"),
              service("published", "publishNotReadyAddresses: true", selector="{app: unready}"),
              service("waiting", "publishNotReadyAddresses: false", selector="{app: unready}"))
        wait("the pod to run", lambda: [p for p in pods(MESHED, "app=unready") if p["status"]["phase"] == "Running"])
        for said in self.both("published", number=4):
            self.assertEqual(by_node(said), {"node1": 4})
        for ns in (MESHED, BARE):
            self.assertEqual(call(ns, "node1", f"waiting.{MESHED}", number=1), REFUSED, ns)
        kubectl("-n", MESHED, "delete", "deployment", "unready")

    def test_endpoints_that_terminate_serve_where_no_other_does(self):
        hook = "lifecycle: {preStop: {sleep: {seconds: 40}}}"
        deploy(MESHED, who("leaving", container=hook, grace=50).replace("set: who", "set: leaving"),
               service("leaving", "", selector="{set: leaving}"))
        self.both("leaving", number=1)
        leaving = pod_of(MESHED, "leaving")
        kubectl("-n", MESHED, "scale", "deployment/leaving", "--replicas=0")
        slices = lambda: get("-n", MESHED, "endpointslices", "-l", "kubernetes.io/service-name=leaving")["items"]
        terminating = lambda: [e for s in slices() for e in s["endpoints"] or [] if e["conditions"].get("terminating")]
        wait("the endpoint to terminate", terminating, 20)
        time.sleep(1)
        for said in self.both("leaving", number=4):
            self.assertEqual(said, {f"{leaving} node1 8000": 4})
        # One that is ready takes over.
        deploy(MESHED, who("next").replace("set: who", "set: leaving"))
        fresh = {f"{pod_of(MESHED, 'next')} node1 8000": 4}
        wait("the next one", lambda: list(self.both("leaving", number=4)) == [fresh, fresh], 20)
        kubectl("-n", MESHED, "delete", "deployment", "leaving", "next", "--wait=false")

    def test_named_target_ports_that_differ_and_several_ports(self):
        named = lambda port: f"ports: [{{name: web, containerPort: {port}}}, {{name: admin, containerPort: 8009}}]"
        several = """
apiVersion: v1
kind: Service
metadata: {name: several}
spec:
  selector: {set: named}
  ports: [{name: web, port: 80, targetPort: web}, {name: admin, port: 81, targetPort: 8009}]
"""
        deploy(MESHED, *(who(f"named-{p}", ports=(p, 8009), container=named(p)).replace("set: who", "set: named")
                         for p in (8001, 8002)), several)
        ports_of = lambda said: {answer.split()[0].rsplit("-", 2)[0] + " " + answer.split()[2] for answer in said}
        for said in self.both("several"):
            self.assertEqual(ports_of(said), {"named-8001 8001", "named-8002 8002"})
        for said in self.both("several", port=81):
            self.assertEqual(ports_of(said), {"named-8001 8009", "named-8002 8009"})

    def test_an_external_name(self):
        apply(MESHED, service("plain", ""), f"""
apiVersion: v1
kind: Service
metadata: {{name: alias}}
spec: {{type: ExternalName, externalName: plain.{MESHED}.svc.cluster.local}}
""")
        for said in self.both("alias", number=40):
            self.assertEqual((len(said), "refused" in said), (3, False), said)

    def test_addresses_from_outside(self):
        balanced = "type: LoadBalancer, sessionAffinity: ClientIP"
        for ns, last in ((MESHED, 1), (STRICT, 2)):
            apply(ns, service("external", f"externalIPs: [192.0.2.{last}]"), service("balanced", balanced, port=81))
            status = {"status": {"loadBalancer": {"ingress": [{"ip": f"198.51.100.{last}"}]}}}
            kubectl("-n", ns, "patch", "service", "balanced", "--subresource=status", "--type=merge", "-p",
                    json.dumps(status))
        for said in self.both("external", host="192.0.2.1", number=40):
            self.assertEqual((len(said), "refused" in said), (3, False), said)
        for said in self.both("balanced", host="198.51.100.1", port=81):
            self.assertEqual(list(said.values()), [24], said)
        # To a strict Service they are mTLS, or nothing: kube-proxy would take the meshed client there in the clear.
        answer = lambda ns, host, port: by_node(call(ns, "node1", host, port, 1))
        for host, port in (("192.0.2.2", 80), ("198.51.100.2", 81)):
            self.assertEqual(answer(MESHED, host, port), {"node1": 1}, host)
            self.assertEqual(answer(BARE, host, port), REFUSED, host)
        # A strict client follows the load balancer's address, not the one that the Service's author chose.
        self.assertEqual(answer(STRICT, "198.51.100.2", 81), {"node1": 1})
        self.assertEqual(answer(STRICT, "192.0.2.2", 80), REFUSED)

    def test_node_ports(self):
        for ns in (MESHED, STRICT):
            apply(ns, service("ported", "type: NodePort"))
        port_of = lambda ns: get("-n", ns, "service", "ported")["spec"]["ports"][0]["nodePort"]
        open_, strict = port_of(MESHED), port_of(STRICT)
        for n in NODES:
            for said in self.both("ported", host=n.ip, port=open_, number=40):
                self.assertEqual((len(said), "refused" in said), (3, False), said)
            answer = lambda ns, port: by_node(call(ns, "node1", n.ip, port, 1))
            self.assertEqual(answer(MESHED, strict), {"node1": 1}, "by mTLS, as its endpoint is strict")
            self.assertEqual(answer(STRICT, strict), {"node1": 1})
            self.assertEqual(answer(BARE, strict), REFUSED)
            self.assertEqual(answer(STRICT, 10250), REFUSED, "the node's other ports are outside the mesh")
        # With an external policy too a pod's connection goes to any endpoint.
        apply(MESHED, service("ported-local", "type: NodePort, externalTrafficPolicy: Local"))
        port = get("-n", MESHED, "service", "ported-local")["spec"]["ports"][0]["nodePort"]
        for said in self.both("ported-local", host=NODES[0].ip, port=port, number=40):
            self.assertEqual((len(said), "refused" in said), (3, False), said)
        # By way of another node kube-proxy does not masquerade, so that to a bare pod an endpoint beside it answers
        # directly, and not as the address that was dialled.
        said = call(MESHED, "node1", NODES[1].ip, port, 40)
        self.assertEqual((len(said), "refused" in said), (3, False), said)
