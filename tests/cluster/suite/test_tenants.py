"""What a user with ordinary rights in two namespaces tries: to be another, to weaken strict, to read or stop others.
Each attack is made as that user and fails."""
import json, unittest

import images, mesh
from mesh import NAMESPACE, TRUST_DOMAIN, deploy, deployment, get, kubectl, pod_of, run_in, wait
from suite.test_operator import countersign

USER = "mallory"
# A meshed namespace and a bare one; both belong to the user. The victim's is somebody else's. In the last one the
# administrator allows exceptions (mesh.py).
MESHED, BARE, VICTIM, OPENED = "tenant-meshed", "tenant-bare", "tenant-victim", "tenant-opened"
RIGHTS = """
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: tenant}
rules:
  - {apiGroups: [""], resources: [pods, services, configmaps], verbs: [get, list, watch, create, update, patch, delete]}
  - {apiGroups: [""], resources: [pods/ephemeralcontainers], verbs: [get, update, patch]}
  - {apiGroups: [""], resources: [pods/exec], verbs: [get, create]}
  - {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [get, list, create, update, patch, delete]}
  - {apiGroups: [spiffeid.spiffe.io], resources: [spiffeids], verbs: [get, list, create, update, patch, delete]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: tenant}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: tenant}
subjects: [{kind: User, apiGroup: rbac.authorization.k8s.io, name: mallory}]
"""
# What a caller from outside sees of a page.
CODE = ("curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}")
# A server that answers whoever reaches it in the clear.
OPEN = deployment("open", ["python3", "-m", "http.server", "8000"], port=8000)


def pod(name="sly", labels=None, annotations=None, spec=None, **container):
    """A pod as the user would write it."""
    return {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "labels": labels or {}, "annotations": annotations or {}},
            "spec": {"containers": [{"name": "app", "image": images.BOX, "imagePullPolicy": "Never",
                                     "args": ["sleep", "infinity"], **container}], **(spec or {})}}


# Opens a connection over the loopback interface, for the kernel to remember, and a second one with the same ports.
INSIDE = """
import socket, sys
def opened(port=0, inside=False):
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if inside: s.setsockopt(socket.SOL_SOCKET, 25, b"lo\\0")
    s.settimeout(2)
    s.bind((sys.argv[1], port))
    return s
first = opened(inside=True)
port = first.getsockname()[1]
try: first.connect((sys.argv[2], 8000))
except OSError: pass
first.close()
second = opened(port)
try:
    second.connect((sys.argv[2], 8000))
    second.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
    print("reached" if second.recv(99) else "closed")
except OSError as e: print("caught:", e)
"""


# A socket whose packets no redirect sees.
RAW = """
import socket
try: socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print("open")
except OSError as e: print(e.strerror)
"""


class Tenants(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.held = [*map(mesh.namespace, (MESHED, VICTIM, OPENED)), mesh.namespace(BARE, inject=False)]
        for held in cls.held:
            held.__enter__()
            cls.addClassCleanup(held.__exit__, None, None, None)
        for ns in (MESHED, BARE):
            kubectl("-n", ns, "apply", "-f", "-", input=RIGHTS)
        probe = "readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}"
        deploy(VICTIM, deployment("web", ["bash", "-c", mesh.NGINX], port=8080, container=probe))
        deploy(BARE, deployment("stranger", ["sleep", "infinity"]), OPEN)
        deploy(MESHED, deployment("app", ["sleep", "infinity"]))

    def as_user(self, ns, *command, said=None):
        """kubectl as the user; an object is its input."""
        given = {} if said is None else {"input": json.dumps(said)}
        return kubectl("--as", USER, "-n", ns, *command, check=False, **given)

    def create(self, ns, obj, really=False):
        return self.as_user(ns, "create", *([] if really else ["--dry-run=server"]), "-f", "-", said=obj)

    def refused(self, done, why):
        self.assertNotEqual(done.returncode, 0, done.stdout)
        self.assertIn(why, done.stderr)

    def address(self, ns, app):
        return get("-n", ns, "pod", pod_of(ns, app))["status"]["podIP"]

    def reached(self, ns, app, url):
        """Whether a pod gets an answer, whatever it is."""
        return run_in(ns, pod_of(ns, app), *CODE, "-k", url, check=False).returncode == 0

    def test_packet_sockets_of_root_in_a_strict_pod(self):
        refused = "Operation not permitted\n"
        for ns, said in ((MESHED, refused), (OPENED, "open\n")):
            kubectl("-n", ns, "create", "-f", "-", input=json.dumps(pod("raw", securityContext={"runAsUser": 0})))
            kubectl("-n", ns, "wait", "pod/raw", "--for=condition=Ready", "--timeout=60s")
            self.assertEqual(run_in(ns, "raw", "python3", "-c", RAW), said)
        kubectl("-n", MESHED, "debug", "raw", "--image", images.BOX, "--image-pull-policy=Never", "-c", "debug",
                "--profile=general", "--", "python3", "-c", RAW)
        log = lambda: kubectl("-n", MESHED, "logs", "raw", "-c", "debug", check=False).stdout
        self.assertEqual(wait("what the ephemeral container says", log), refused)
        for ns in (MESHED, OPENED):
            kubectl("-n", ns, "delete", "pod", "raw", "--wait=false")

    def test_another_identity_by_a_hand_made_object(self):
        of_victim = f"spiffe://{TRUST_DOMAIN}/ns/{VICTIM}/sa/default"
        node = get("nodes", "node1")["metadata"]["uid"]
        spec = {"parentId": f"spiffe://{TRUST_DOMAIN}/spire/agent/k8s_psat/test/{node}",
                "selector": {"namespace": MESHED}}
        own = f"spiffe://{TRUST_DOMAIN}/ns/{MESHED}/sa/default"
        before = mesh.server("entry", "show", "--output=json").count(of_victim)
        for name, more in [("anothers", {"spiffeId": of_victim}),
                           ("webhook", {"spiffeId": own, "dnsNames": [f"countersign-injector.{NAMESPACE}.svc"]}),
                           ("neighbour", {"spiffeId": own, "dnsNames": [f"web.{VICTIM}.svc"]})]:
            made = self.create(MESHED, {"apiVersion": "spiffeid.spiffe.io/v1beta1", "kind": "SpiffeID",
                                        "metadata": {"name": name}, "spec": {**spec, **more}}, really=True)
            self.assertEqual(made.returncode, 0, made.stderr)
            status = lambda: get("-n", MESHED, "spiffeid", name).get("status", {})
            condition = wait(f"the status of {name}", lambda: status().get("conditions"), 20)[0]
            self.assertEqual((condition["status"], condition["reason"]), ("False", "Refused"))
            self.assertNotIn("entryId", status())
        self.assertEqual(mesh.server("entry", "show", "--output=json").count(of_victim), before)

    def test_a_command_in_the_sidecars_container(self):
        app = pod_of(MESHED, "app")
        command = lambda container, *by: kubectl(*by, "-n", MESHED, "exec", app, "-c", container, "--", "/countersign",
                                                 "--version", check=False)
        for container in ("countersign-proxy", "countersign-redirect"):
            self.refused(command(container, "--as", USER), "for administrators of the mesh")
        self.assertIn("countersign ", command("countersign-proxy").stdout, "an administrator may")
        self.assertEqual(self.as_user(MESHED, "exec", app, "-c", "app", "--", "true").returncode, 0)

    def test_a_container_that_sees_the_sidecars_processes(self):
        app = pod_of(MESHED, "app")
        for target in ("countersign-proxy", "countersign-redirect"):
            debug = {"spec": {"ephemeralContainers": [{"name": "debug", "image": images.BOX, "imagePullPolicy": "Never",
                                                       "targetContainerName": target, "args": ["sleep", "infinity"]}]}}
            patched = self.as_user(MESHED, "patch", "pod", app, "--subresource=ephemeralcontainers", "-p",
                                   json.dumps(debug))
            self.refused(patched, target)

    def test_a_connection_over_the_loopback_interface(self):
        out = lambda ns, app: run_in(ns, pod_of(ns, app), "python3", "-c", INSIDE, self.address(ns, app),
                                     self.address(BARE, "open"))
        self.assertEqual(out(BARE, "stranger").strip(), "reached", "the program works where there is no redirect")
        self.assertRegex(out(MESHED, "app"), "caught|closed")

    def test_a_resolver_of_the_pods_own(self):
        own = {"dnsConfig": {"nameservers": ["192.0.2.53"]}}
        self.refused(self.create(MESHED, pod(spec=own)), "mesh.allowExceptions")

    def test_the_agents_folder(self):
        folder = {"volumes": [{"name": "v", "hostPath": {"path": "/run/countersign/agent"}}]}
        mounted = lambda **more: {"volumeMounts": [{"name": "v", "mountPath": "/a", **more}]}
        off = {"countersign.dev/inject": "disabled"}
        for labels in ({}, off):
            self.refused(self.create(MESHED, pod(labels=labels, spec=folder, **mounted())), "readOnly alone")
        for path in ("/run/countersign", "/var/run/countersign/agent/", "/run//countersign", "/run/./countersign/agent",
                     "/proc/1/root/run/countersign/agent"):
            volume = {"volumes": [{"name": "v", "hostPath": {"path": path}}]}
            self.refused(self.create(BARE, pod(spec=volume, **mounted(readOnly=False))), "readOnly alone")
        self.assertEqual(self.create(BARE, pod(spec=folder, **mounted(readOnly=True))).returncode, 0, "a client may")
        for path in ("/run/countersign/cni", "/var/run/countersign//cni/cni.sock", "/run/countersign",
                     "/run/countersign/."):
            volume = {"volumes": [{"name": "v", "hostPath": {"path": path}}]}
            self.refused(self.create(BARE, pod(spec=volume, **mounted(readOnly=True))), "container runtime's")
        ours = {"volumes": [{"name": "countersign-agent", "emptyDir": {}}]}
        self.refused(self.create(MESHED, pod(spec=ours)), "volume `countersign-agent`")
        # An injection that is only claimed.
        claimed = {"countersign.dev/injected": "0.1.0"}
        of_driver = {"volumes": [{"name": "countersign-agent", "csi": {"driver": "csi.countersign.dev"}}]}
        for spec in (ours, of_driver):
            self.refused(self.create(MESHED, pod(annotations=claimed, spec=spec)), "volume `countersign-agent`")
        stolen = {"volumeMounts": [{"name": "countersign-agent", "mountPath": "/a"}]}
        self.refused(self.create(MESHED, pod(**stolen)), "`countersign-agent`")

    def test_annotations_that_weaken_strict(self):
        for key, value in [("ignore-inbound-ports", "8080"), ("ignore-outbound-ports", "8080"),
                           ("ignore-outbound-cidrs", "10.0.0.0/8"), ("allow-udp-ports", "4433"),
                           ("port-modes", "8080=permissive")]:
            done = self.create(MESHED, pod(annotations={f"countersign.dev/{key}": value}))
            self.refused(done, "mesh.allowExceptions")
        # On a running pod nobody is asked, and nothing changes.
        deploy(MESHED, OPEN)
        running = pod_of(MESHED, "open")
        for key, value in [("port-modes", "8000=off"), ("mode", "off")]:
            done = self.as_user(MESHED, "annotate", "pod", running, f"countersign.dev/{key}={value}")
            self.assertEqual(done.returncode, 0, done.stderr)
        exceptions = "port-modes=8000=off"
        found = json.loads(countersign("check", "--output", "json").stdout)["checks"]
        found = next(check for check in found if check["check"] == "exceptions")
        self.assertFalse(found["ok"])
        self.assertIn(f"{MESHED}/{running} ({exceptions})", found["found"])
        self.assertFalse(self.reached(BARE, "stranger", f"http://{self.address(MESHED, 'open')}:8000/"))
        self.assertEqual(run_in(MESHED, pod_of(MESHED, "app"), *CODE, "http://open:8000/"), "200", "the mesh is let in")

    def test_where_the_administrator_allows_it_one_port_is_opened_and_no_other(self):
        deploy(OPENED, OPEN)
        running, at = pod_of(OPENED, "open"), self.address(OPENED, "open")
        by_api_server = ("get", "--raw", f"/api/v1/namespaces/{OPENED}/services/open:8000/proxy/etc/passwd")
        self.assertNotEqual(kubectl(*by_api_server, check=False).returncode, 0, "strict refuses the API server")
        kubectl("-n", OPENED, "annotate", "pod", running, "countersign.dev/port-modes=8000=permissive")
        wait("the API server to be let in", lambda: kubectl(*by_api_server, check=False).returncode == 0, 20)
        self.assertTrue(self.reached(BARE, "stranger", f"http://{at}:8000/"))
        pages = lambda: run_in(BARE, pod_of(BARE, "stranger"), *CODE, f"http://{at}:15020/metrics")
        self.assertEqual(pages(), "403")
        plan = json.loads(countersign("strict", "--plan", "-n", OPENED, "--output", "json").stdout)
        self.assertEqual(plan["allowed_exceptions"],
                         [{"workload": f"{OPENED}/{running}", "what": "port-modes=8000=permissive"}])
        self.assertEqual((plan["plaintext"], plan["exceptions"]), ([], []), "who comes in there goes on doing so")
        kubectl("-n", OPENED, "annotate", "--overwrite", "pod", running, "countersign.dev/port-modes=15020=permissive")
        wait("the pages to be opened", lambda: pages() == "200", 20)
        self.assertFalse(self.reached(BARE, "stranger", f"http://{at}:8000/"))

    def test_an_endpoint_of_the_api_server(self):
        target = self.address(BARE, "open")
        self.assertTrue(self.reached(BARE, "stranger", f"http://{target}:8000/"), "it is there")
        for name in ("kubernetes", "more"):
            made = self.create(MESHED, {
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "kubernetes"}},
                "endpoints": [{"addresses": [target]}], "ports": [{"name": "https", "port": 8000}]}, really=True)
            self.assertEqual(made.returncode, 0, made.stderr)
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kubernetes"},
                   "spec": {"ports": [{"name": "https", "port": 8000}]}}
        self.assertEqual(self.create(MESHED, service, really=True).returncode, 0)
        own = get("-n", MESHED, "service", "kubernetes")["spec"]["clusterIP"]
        # The API server itself is reached, by both of its addresses; no other port of its machine is.
        api = get("-n", "default", "endpointslice", "kubernetes")
        (machine,), port = api["endpoints"][0]["addresses"], api["ports"][0]["port"]
        for url in ("https://kubernetes.default.svc/version", f"https://{machine}:{port}/version"):
            wait(url, lambda: self.reached(MESHED, "app", url), 20)
        self.assertTrue(self.reached(BARE, "stranger", f"https://{machine}:10250/"), "the kubelet is there")
        for url in (f"http://{target}:8000/", f"http://{own}:8000/", f"https://{machine}:10250/"):
            self.assertFalse(self.reached(MESHED, "app", url), url)

    def test_an_external_address_that_is_anothers(self):
        deploy(MESHED, OPEN)
        service = get("-n", VICTIM, "service", "web")["spec"]["clusterIP"]
        node = get("nodes", "node1")["status"]["addresses"][0]["address"]
        claim = lambda name, addresses: {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"selector": {"app": "open"}, "externalIPs": addresses,
                     "ports": [{"port": 8080, "targetPort": 8000}]}}
        anothers = [service, self.address(VICTIM, "web")]
        made = self.create(MESHED, claim("claim", [*anothers, node, "192.0.2.66"]), really=True)
        self.assertEqual(made.returncode, 0, made.stderr)
        own = get("-n", MESHED, "service", "claim")["spec"]["clusterIP"]
        wait("the Service", lambda: self.reached(MESHED, "app", f"http://{own}:8080/"), 20)
        for at in anothers:
            said = run_in(MESHED, pod_of(MESHED, "app"), "curl", "-sS", "-m", "5", f"http://{at}:8080/")
            self.assertEqual(said, "ok", at)
        for at in (node, "192.0.2.66"):
            self.assertFalse(self.reached(MESHED, "app", f"http://{at}:8080/"), f"{at}: strict believes no tenant")
        # Where the administrator allows exceptions an address outside of the cluster counts.
        deploy(OPENED, OPEN)
        kubectl("-n", OPENED, "create", "-f", "-", input=json.dumps(claim("claim", ["192.0.2.67"])))
        wait("its address", lambda: self.reached(MESHED, "app", "http://192.0.2.67:8080/"), 20)

    def test_containers_as_the_sidecars_user(self):
        sly = {"runAsUser": 2102}
        off = {"countersign.dev/inject": "disabled"}
        for labels in ({}, off):
            self.refused(self.create(MESHED, pod(labels=labels, securityContext=sly)), "UID 2102")
            self.refused(self.create(MESHED, pod(labels=labels, spec={"securityContext": sly})), "UID 2102")
            first = {"name": "first", "image": images.BOX, "securityContext": sly}
            self.refused(self.create(MESHED, pod(labels=labels, spec={"initContainers": [first]})), "UID 2102")
        # A sidecar of one's own, in a pod that is left alone.
        mine = {"name": "countersign-proxy", "image": images.BOX, "securityContext": sly}
        for left in ({"labels": off}, {"annotations": off}):
            self.refused(self.create(MESHED, pod(spec={"initContainers": [mine]}, **left)), "UID 2102")
        running = pod_of(MESHED, "app")
        self.assertEqual(self.as_user(MESHED, "label", "pod", running, "countersign.dev/inject=disabled").returncode, 0)
        debug = {"name": "sly", "image": images.BOX, "imagePullPolicy": "Never", "securityContext": sly}
        held = get("-n", MESHED, "pod", running)
        held["spec"]["ephemeralContainers"] = [debug]
        raw = f"/api/v1/namespaces/{MESHED}/pods/{running}/ephemeralcontainers"
        self.refused(self.as_user(MESHED, "replace", "--raw", raw, "-f", "-", said=held), "UID 2102")
        patch = json.dumps({"spec": {"ephemeralContainers": [debug]}})
        done = self.as_user(MESHED, "patch", "pod", running, "--subresource=ephemeralcontainers", "-p", patch)
        self.refused(done, "UID 2102")

    def test_another_image_in_place_of_ours(self):
        """Images may be changed as long as a pod runs, and before it has begun."""
        path = "/spec/initContainers/{}/image"
        changed = lambda at: json.dumps([{"op": "replace", "path": path.format(at), "value": "sly:1"}])
        running = pod_of(MESHED, "app")
        names = [c["name"] for c in get("-n", MESHED, "pod", running)["spec"]["initContainers"]]
        self.assertEqual(names, ["countersign-redirect", "countersign-proxy"])
        waiting = pod("waiting", spec={"schedulingGates": [{"name": "sly.example/wait"}]})
        self.assertEqual(self.create(MESHED, waiting, really=True).returncode, 0)
        for name in (running, "waiting"):
            for at in (0, 1):
                done = self.as_user(MESHED, "patch", "pod", name, "--type=json", "-p", changed(at))
                self.refused(done, "stay what the injection made them")
        # What is the user's own may change.
        own = json.dumps([{"op": "replace", "path": "/spec/containers/0/image", "value": "own:1"}])
        done = self.as_user(MESHED, "patch", "pod", "waiting", "--type=json", "-p", own)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_roots_number_in_a_pod_is_not_the_nodes_root(self):
        """An agent tells root what it has; whoever is root in a pod with the volume has the same number."""
        volume = {"name": "agent", "csi": {"driver": "csi.countersign.dev", "readOnly": True}}
        asking = pod("asking", spec={"volumes": [volume], "restartPolicy": "Never"}, image=images.COUNTERSIGN,
                     args=["status", "--socket=/agent/agent.sock"], securityContext={"runAsUser": 0},
                     volumeMounts=[{"name": "agent", "mountPath": "/agent", "readOnly": True}])
        self.assertEqual(self.create(BARE, asking, really=True).returncode, 0)
        said = lambda: mesh.logs(BARE, "asking", "app", check=False).stdout
        wait("its answer", lambda: "root in a pod is not root of the node" in (said() or ""), 60)
        self.assertNotIn("spiffe://", said())

    def test_the_pages_of_others(self):
        victim = self.address(VICTIM, "web")
        asks = lambda url: run_in(BARE, pod_of(BARE, "stranger"), *CODE, url)
        for page in ("ready", "live", "mode", "metrics", "status", "probe/app/readiness"):
            self.assertEqual(asks(f"http://{victim}:15020/{page}"), "403", page)
        # By a node's own address, which the kernel of that node puts in the place of the caller's.
        node = get("-n", VICTIM, "pod", pod_of(VICTIM, "web"))["status"]["hostIP"]
        for obj in ({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "pages"},
                     "spec": {"type": "NodePort", "ports": [{"name": "p", "port": 80}]}},
                    {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                     "metadata": {"name": "pages", "labels": {"kubernetes.io/service-name": "pages"}},
                     "endpoints": [{"addresses": [victim]}], "ports": [{"name": "p", "port": 15020}]}):
            self.assertEqual(self.create(BARE, obj, really=True).returncode, 0)
        port = get("-n", BARE, "service", "pages")["spec"]["ports"][0]["nodePort"]
        url = f"http://{node}:{port}/probe/app/readiness"
        answered = lambda: run_in(BARE, pod_of(BARE, "stranger"), *CODE, url, check=False)
        told = wait("the NodePort", lambda: (d := answered()).returncode == 0 and d.stdout, 20)
        self.assertIn(told, ("403", "404"), "the path of a probe cannot be guessed")

    def test_words_that_mean_nothing(self):
        wrong = [("countersign.dev/inject", "true", "did you mean `enabled`?"),
                 ("countersign.dev/mode", "stict", "did you mean `strict`?")]
        running = pod_of(BARE, "stranger")
        for key, word, meant in wrong:
            for place in ("labels", "annotations"):
                self.refused(self.create(MESHED, pod(**{place: {key: word}})), meant)
            for verb in ("label", "annotate"):
                self.refused(self.as_user(BARE, verb, "pod", running, f"{key}={word}"), meant)
                # Its administrator, by mistake.
                made = kubectl(verb, "namespace", BARE, f"{key}={word}", "--dry-run=server", check=False)
                self.refused(made, meant)
