"""What an operator asks of a running mesh."""
import contextlib, json, pathlib, subprocess as sp, tempfile, time, unittest

import cluster, mesh
from mesh import NAMESPACE, deploy, deployment, get, kubectl, pod_of, run_in, wait, web


def countersign(*command):
    """A command of an operator with the cluster's KUBECONFIG."""
    return sp.run(cluster.operators(mesh.binary(), *command), text=True, capture_output=True)


@contextlib.contextmanager
def user(name, *verbs_and_resources):
    """A user who may do this and nothing else, each as `verb,verb resource,resource`; yields its `countersign`."""
    config = json.loads((cluster.STATE / "pki" / "admin.conf").read_text())
    config["users"][0]["user"]["as"] = name
    made = []
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "user.conf"
        file.write_text(json.dumps(config))
        try:
            for n, rule in enumerate(verbs_and_resources):
                verbs, resources = rule.split()
                role = f"{name}-{n}"
                made += [f"clusterrole/{role}", f"clusterrolebinding/{role}"]
                kubectl("create", "clusterrole", role, f"--verb={verbs}", f"--resource={resources}")
                kubectl("create", "clusterrolebinding", role, f"--clusterrole={role}", f"--user={name}")
            as_them = ["env", f"KUBECONFIG={file}", mesh.binary()]
            yield lambda *command: sp.run(cluster.operators(*as_them, *command), text=True, capture_output=True)
        finally:
            for what in made:
                kubectl("delete", what, "--ignore-not-found")


# What `strict --plan` and `explain pod` read of objects, and what they need to ask a sidecar.
LOOKS = ("get,list pods,services,namespaces", "get endpointslices.discovery.k8s.io", "get deployments.apps",
         "get spiffeids.spiffeid.spiffe.io")
ASKS = "get,create pods/portforward"


def settings(**changed):
    """Changes the mesh's settings."""
    kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-mesh", "-p", json.dumps({"data": changed}))


class Operator(unittest.TestCase):
    def test_verify_makes_a_handshake_between_two_nodes_and_the_wire_holds_no_word_of_it(self):
        with tempfile.TemporaryDirectory() as folder:
            wire = f"{folder}/wire.pcap"
            done = countersign("verify", "--pcap", wire, "--output", "json")
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            told = json.loads(done.stdout)
            self.assertEqual([c["check"] for c in told["checks"]], ["pods", "request", "handshake", "wire"])
            self.assertIn("node1", told["checks"][0]["found"])
            self.assertIn("node2", told["checks"][0]["found"])
            shake = told["handshake"]
            for end in ("client", "server"):
                self.assertRegex(shake[end]["spiffe_id"],
                                 rf"^spiffe://{mesh.TRUST_DOMAIN}/ns/countersign-verify-\w+/sa/default$")
            self.assertNotEqual(shake["client"]["serial"], shake["server"]["serial"])
            self.assertEqual((shake["tls"], shake["cipher"]), ("TLSv1.3 X25519MLKEM768", "TLS_AES_128_GCM_SHA256"))
            read = sp.run(["tcpdump", "-nr", wire, "tcp port 15008"], text=True, capture_output=True, check=True).stdout
            self.assertGreater(len(read.splitlines()), 8, "a file that others can read")
            # It can fail: a mesh that forwards in the clear is found out, by the sidecars and by the wire.
            settings(transparent="true")
            try:
                done = countersign("verify", "--pcap", wire, "--output", "json")
                opened = self.check()["settings"]
                self.assertIn("an uninstall was begun (`transparent: true` in ConfigMap", opened["found"])
                self.assertIn(f"kubectl -n {NAMESPACE} patch configmap countersign-mesh", opened["mend"])
            finally:
                kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-mesh", "--type=json", "-p",
                        '[{"op":"remove","path":"/data/transparent"}]')
            self.assertEqual(done.returncode, 1, done.stderr)
            found = {c["check"]: c for c in json.loads(done.stdout)["checks"]}
            self.assertIn("in the clear", found["handshake"]["found"])
            self.assertIn("in the clear", found["wire"]["found"])
        self.assertEqual(countersign("verify", "--pcap", "/nowhere/x.pcap").returncode, 2)
        self.assertIn("no installation in namespace `elsewhere`",
                      countersign("verify", "--mesh-namespace", "elsewhere").stderr)
        left = lambda: [n for n in kubectl("get", "namespaces", "-o", "name").split() if "countersign-verify" in n]
        wait("its namespaces to be gone", lambda: not left(), 60)

    def test_ttls_and_key_types_change_on_a_running_mesh_that_restarts_nothing(self):
        running = lambda: {p["metadata"]["uid"]: [c["restartCount"] for c in p["status"]["containerStatuses"]]
                           for p in mesh.pods(NAMESPACE, "app.kubernetes.io/name=countersign")}
        before = running()
        first = json.loads(mesh.server("authority", "show", "--output=json"))["active"]["id"]
        settings(svidTTL="3m", caTTL="20h", workloadKeyType="rsa-2048", caKeyType="ec-p384")
        try:
            heard = lambda name, container: "settings have changed" in mesh.logs(NAMESPACE, name, container)
            for name, container in [("countersign-server-0", "server"),
                                    *((mesh.agent_on(n.name), "agent") for n in mesh.NODES)]:
                wait(f"{name} to take the settings up", lambda: heard(name, container), 90)
            for step in ("prepare", "activate"):
                mesh.server("authority", step)
            with mesh.namespace("retuned") as ns:
                deploy(ns, web(), deployment("client", ["sleep", "infinity"]))
                self.assertEqual(run_in(ns, pod_of(ns, "client"), "curl", "-sSf", "-m", "10", "http://web:8080/"), "ok")
                asked = run_in(ns, pod_of(ns, "client"), "/countersign", "x509", "fetch",
                               "--socket=/run/countersign/agent/agent.sock", "--output=json",
                               container="countersign-proxy")
                svid = json.loads(asked)[0]
                text = sp.run(["openssl", "x509", "-noout", "-text"], input=svid["certificates"], text=True,
                              stdout=sp.PIPE, check=True).stdout
                self.assertIn("Public-Key: (2048 bit)", text)
                self.assertIn("ecdsa-with-SHA384", text, "signed by the new authority")
                self.assertLessEqual(svid["expires_at"] - time.time(), 180)
            show = json.loads(mesh.server("authority", "show", "--output=json"))
            self.assertNotEqual(show["active"]["id"], first)
            # A mistake is taken by nobody, and named by `check`.
            settings(svidTTL="soon")
            found = self.check()["settings"]
            self.assertFalse(found["ok"])
            self.assertIn("svidTTL: `soon` is not a length of time", found["found"])
            wait("the server to say so",
                 lambda: "the settings stay as they are" in mesh.logs(NAMESPACE, "countersign-server-0", "server"), 90)
            self.assertEqual(running(), before, "and nothing was started anew")
        finally:
            settings(svidTTL="1h", caTTL="24h", workloadKeyType="ec-p256", caKeyType="ec-p256")

    def check(self, *flags):
        done = countersign("check", "--output", "json", *flags)
        told = json.loads(done.stdout) if done.stdout else self.fail(done.stderr)
        self.assertEqual(done.returncode, 0 if told["ok"] else 1)
        return {c["check"]: c for c in told["checks"]}

    def test_check_is_green_on_a_mesh_that_is_well_and_names_what_is_not(self):
        seen = {}

        def is_green():
            seen.update(found=self.check())
            return all(row["ok"] for row in seen["found"].values())
        try:
            wait("a green check", is_green, 60)
        except AssertionError:
            self.fail([row for row in seen["found"].values() if not row["ok"]])
        found = seen["found"]
        self.assertEqual(len(found), 26)
        self.assertEqual(found["pod source"]["found"], "node2: API server (the kubelet does not verify or answer);"
                         " node1: API server and kubelet")
        before = self.check("--before")
        self.assertEqual(set(before), {"API version", "permissions", "clocks", "volume", "pod source", "CSI driver",
                                       "agents' pods"})
        self.assertIn("verify: node1; kubelets that sign themselves, and are not asked: node2",
                      before["pod source"]["found"])
        # An agent that is away is named with its node, and what mends it.
        kubectl("label", "node", "node2", "test/no-agent=true")
        terms = [{"matchExpressions": [{"key": "test/no-agent", "operator": "DoesNotExist"}]}]
        affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
        kubectl("-n", NAMESPACE, "patch", "daemonset", "countersign-agent", "--type=strategic", "-p",
                json.dumps({"spec": {"template": {"spec": {"affinity": affinity}}}}))
        try:
            # While the DaemonSet replaces its pods, another node may be named as well.
            is_missed = lambda c: "no agent is ready on node2" in c["found"] and c
            bad = wait("the missing agent", lambda: is_missed(self.check()["agents"]), 60)
            self.assertFalse(bad["ok"])
            self.assertTrue(bad["mend"])
        finally:
            kubectl("label", "node", "node2", "test/no-agent-")
            mesh.ready()
        # Where there is no installation that is the only finding, and the namespace that has one is named.
        missing = self.check("-n", "elsewhere")
        self.assertEqual(list(missing), ["installation"])
        self.assertIn(f"there is one in namespace `{NAMESPACE}`", missing["installation"]["found"])
        self.assertEqual(missing["installation"]["mend"], f"say -n {NAMESPACE}")

    def test_explain_follows_a_pod_into_the_mesh_and_says_where_it_stops(self):
        with mesh.namespace("explained") as ns:
            deploy(ns, deployment("web", ["python3", "-m", "http.server", "8000"], port=8000),
                   deployment("client", ["sleep", "infinity"]))
            client = pod_of(ns, "client")
            run_in(ns, client, "curl", "-sSf", "-m", "10", "http://web:8000/etc/hosts")
            explain = lambda pod: countersign("explain", "pod", pod, "-n", ns, "--output", "json")
            counts = lambda t: {(c["direction"], c["mode"]): c["count"] for c in t["sidecar"]["connections"]}
            explained = lambda: json.loads(explain(client).stdout)
            told = wait("its connection", lambda: (t := explained()) and counts(t)["outbound", "mtls"] and t, 10)
            self.assertTrue(told["ok"], told)
            steps = ["pod", "injection", "registration", "agent", "sidecar", "attestation", "SVID", "mode",
                     "handshakes"]
            self.assertEqual([s["step"] for s in told["steps"]], steps)
            sidecar = told["sidecar"]
            self.assertEqual(sidecar["identity"]["spiffe_id"], f"spiffe://{mesh.TRUST_DOMAIN}/ns/{ns}/sa/default")
            self.assertEqual((sidecar["mode"], sidecar["agent_refusal"]), ("strict", None))
            said = countersign("explain", "pod", client, "-n", ns).stdout
            self.assertIn("outbound: 1 over mTLS, 0 in the clear, 0 refused", said)
            # A destination outside the mesh is refused, and explained by its code.
            run_in(ns, client, "curl", "-sS", "-m", "5", "http://192.0.2.1:81/", check=False)
            refusals = lambda: {(r["direction"], r["reason"]): r["count"] for r in explained()["sidecar"]["refused"]}
            self.assertEqual(wait("the refusal", lambda: refusals().get(("outbound", "not_meshed")), 10), 1)
            self.only_inside(ns, client, get("-n", ns, "pod", pod_of(ns, "web"))["status"]["podIP"])
            # Who may not open a port-forward is told so; who may needs no log.
            with user("eve", *LOOKS) as as_eve:
                look = lambda: as_eve("explain", "pod", client, "-n", ns, "--output", "json")
                refused = wait("the right to look", lambda: (d := look()).stdout and d, 10)
                self.assertEqual(refused.returncode, 1, refused.stderr)
                step = json.loads(refused.stdout)["steps"][-1]
                self.assertEqual((step["step"], step["ok"]), ("sidecar", False))
                self.assertIn("get and create on pods/portforward", step["found"])
            with user("ann", *LOOKS, ASKS) as as_ann:
                wait("the right to ask", lambda: as_ann("explain", "pod", client, "-n", ns).returncode == 0, 10)
            kubectl("-n", ns, "apply", "-f", "-",
                    input="apiVersion: v1\nkind: Pod\n"
                          "metadata: {name: bare, labels: {countersign.dev/inject: disabled}}\n"
                          "spec: {terminationGracePeriodSeconds: 1, containers: [{name: app,"
                          f" image: {mesh.images.BOX}, imagePullPolicy: Never, args: [sleep, infinity]" "}]}")
            bare = explain("bare")
            self.assertEqual(bare.returncode, 1)
            self.assertIn("its label countersign.dev/inject is disabled", bare.stdout)
            self.assertIn("there is no pod", countersign("explain", "pod", "nobody", "-n", ns).stderr)

    def only_inside(self, ns, client, address):
        """The pages of who talks to whom are there for those inside the pod alone."""
        pages = ("/live", "/status", "/plaintext")
        code = ("curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}")
        with mesh.namespace("stranger", inject=False) as outside:
            deploy(outside, deployment("stranger", ["sleep", "infinity"]))
            stranger = pod_of(outside, "stranger")
            told = [run_in(outside, stranger, *code, f"http://{address}:15020{page}") for page in pages]
            self.assertEqual(told, ["403"] * 3)
        self.assertEqual([run_in(ns, client, *code, f"http://127.0.0.1:15020{page}") for page in pages], ["200"] * 3)

    def test_strict_is_planned_by_the_plaintext_peers_seen_and_then_done(self):
        kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-mesh", "-p", '{"data":{"mode":"permissive"}}')
        try:
            with mesh.namespace("to-strict") as ns, mesh.namespace("still-plain", inject=False) as outside:
                began = time.time()
                deploy(ns, deployment("web", ["python3", "-m", "http.server", "8000"], port=8000))
                # One that calls, and one that connects once and says nothing for ever.
                hold = f"import socket, time; s = socket.create_connection(('web.{ns}', 8000)); time.sleep(1e6)"
                deploy(outside, deployment("old", ["sleep", "infinity"]))
                old, web = pod_of(outside, "old"), pod_of(ns, "web")
                request = ("curl", "-sSf", "-m", "5", f"http://web.{ns}:8000/etc/hosts")
                call = lambda: run_in(outside, old, *request, check=False).returncode
                wait("plaintext to be taken", lambda: call() == 0, 20)
                deploy(outside, deployment("held", ["python3", "-c", hold]))
                held = pod_of(outside, "held")
                plan = lambda: json.loads(countersign("strict", "--plan", "-n", ns, "--output", "json").stdout)
                row = lambda p, pod, kind="plaintext": next((r for r in p[kind] if r["peer"].endswith(f"/{pod}")), {})
                both = lambda p: (row(p, old).get("open"), row(p, held).get("open")) == (0, 1)
                found = wait("one that is over and one that never ends", lambda: both(p := plan()) and p, 20)
                self.assertFalse(found["moved"])
                seen = row(found, old)
                self.assertEqual((seen["workload"], seen["direction"], seen["port"]), (f"{ns}/{web}", "in", 8000))
                self.assertEqual(seen["peer"], f"pod still-plain/{old}")
                self.assertGreaterEqual(seen["total"], 1)
                self.assertLessEqual(began - 1, seen["first_seen"])
                self.assertLessEqual(seen["first_seen"], seen["last_seen"])
                asked = next(s for s in found["sidecars"] if s["workload"] == f"{ns}/{web}")
                self.assertEqual((asked["forgotten"], found["unknown"]), (0, []))
                self.assertLessEqual(began - 1, asked["since"], "when the sidecar started")
                shown = countersign("strict", "--plan", "-n", ns)
                self.assertRegex(shown.stdout, rf"in +pod still-plain/{held} +8000 +carried +1/1 ")
                self.assertIn("have looked since", shown.stderr)
                refused = countersign("strict", "-n", ns)
                self.assertEqual(refused.returncode, 1)
                self.assertIn("nothing was changed", refused.stderr)
                self.assertEqual(call(), 0)
                moved_at = int(time.time())
                self.assertEqual(countersign("strict", "-n", ns, "--force").returncode, 0)
                wait("strict to hold", lambda: call() != 0, 20)
                self.assertEqual(get("namespace", ns)["metadata"]["annotations"]["countersign.dev/mode"], "strict")
                apart = lambda: (r := row(plan(), old, "refused")) and r["last_seen"] >= moved_at and r
                seen = wait("the refused peer apart from the carried", apart, 10)
                self.assertEqual((seen["direction"], seen["port"], seen["open"]), ("in", 8000, 0))
        finally:
            kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-mesh", "-p", '{"data":{"mode":"strict"}}')
        self.assertEqual(countersign("strict").returncode, 2)

    def test_strict_moves_nothing_while_a_sidecar_cannot_be_asked_and_needs_no_log(self):
        kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-mesh", "-p", '{"data":{"mode":"permissive"}}')
        try:
            with mesh.namespace("unasked") as ns:
                deploy(ns, deployment("web", ["sleep", "infinity"]))
                web = f"{ns}/{pod_of(ns, 'web')}"
                moved = lambda: get("namespace", ns)["metadata"].get("annotations", {}).get("countersign.dev/mode")
                with user("blind", *LOOKS, "patch namespaces") as as_blind:
                    move = lambda: as_blind("strict", "-n", ns, "--output", "json")
                    done = wait("the right to look", lambda: (d := move()).stdout and d, 10)
                    self.assertEqual(done.returncode, 1, done.stderr)
                    (unknown,) = json.loads(done.stdout)["unknown"]
                    self.assertEqual((unknown["workload"], unknown["reason"]), (web, "forbidden"))
                    self.assertIn("pods/portforward", unknown["why"])
                    self.assertIn("get and create on pods/portforward", unknown["mend"])
                    self.assertIn("nothing was changed", done.stderr)
                    self.assertNotEqual(moved(), "strict")
                with user("asking", *LOOKS, ASKS, "patch namespaces") as as_asking:
                    may = ("auth", "can-i", "get", "pods", "--subresource=log")
                    logs = kubectl("-n", ns, *may, "--as=asking", check=False)
                    self.assertEqual(logs.stdout.strip(), "no")
                    plan = lambda: as_asking("strict", "--plan", "-n", ns, "--output", "json")
                    clear = lambda: (d := plan()).returncode == 0 and json.loads(d.stdout)["sidecars"]
                    wait("a plan with no pod unknown", clear, 10)
                    self.assertEqual(as_asking("strict", "-n", ns).returncode, 0)
                    self.assertEqual(moved(), "strict")
        finally:
            kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-mesh", "-p", '{"data":{"mode":"strict"}}')
