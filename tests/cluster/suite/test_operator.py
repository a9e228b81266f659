"""What an operator asks of a running mesh."""
import json, subprocess as sp, tempfile, time, unittest

import cluster, mesh
from mesh import NAMESPACE, deploy, deployment, get, kubectl, pod_of, run_in, wait, web


def countersign(*command):
    """A command of an operator with the cluster's KUBECONFIG."""
    return sp.run(cluster.operators(mesh.binary(), *command), text=True, capture_output=True)


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
        found = wait("a green check", lambda: (c := self.check()) and all(x["ok"] for x in c.values()) and c, 30)
        self.assertEqual(len(found), 15)
        self.assertEqual(set(self.check("--before")), {"API version", "permissions", "clocks"})
        # An agent that is away is named with its node, and what mends it.
        kubectl("label", "node", "node2", "test/no-agent=true")
        terms = [{"matchExpressions": [{"key": "test/no-agent", "operator": "DoesNotExist"}]}]
        affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
        kubectl("-n", NAMESPACE, "patch", "daemonset", "countersign-agent", "--type=strategic", "-p",
                json.dumps({"spec": {"template": {"spec": {"affinity": affinity}}}}))
        try:
            bad = wait("the missing agent", lambda: not (c := self.check()["agents"])["ok"] and c, 40)
            self.assertIn("no agent is ready on node2", bad["found"])
            self.assertTrue(bad["mend"])
        finally:
            kubectl("label", "node", "node2", "test/no-agent-")
            mesh.ready()
        # A user who may nothing is told so.
        missing = countersign("check", "-n", "elsewhere", "--output", "json")
        self.assertEqual(missing.returncode, 1)
        self.assertIn("no server is ready", missing.stdout)

    def test_explain_follows_a_pod_into_the_mesh_and_says_where_it_stops(self):
        with mesh.namespace("explained") as ns:
            deploy(ns, deployment("web", ["python3", "-m", "http.server", "8000"], port=8000),
                   deployment("client", ["sleep", "infinity"]))
            client = pod_of(ns, "client")
            run_in(ns, client, "curl", "-sSf", "-m", "10", "http://web:8000/etc/hosts")
            explain = lambda pod: countersign("explain", "pod", pod, "-n", ns, "--output", "json")
            told = wait("its connection", lambda: (t := json.loads(explain(client).stdout))["connections"] and t, 10)
            self.assertTrue(told["ok"], told)
            self.assertEqual([s["step"] for s in told["steps"]],
                             ["injection", "registration", "agent", "attestation", "SVID", "mode", "handshakes"])
            last = told["connections"][-1]
            self.assertEqual((last["mode"], last["source_id"], last["destination_id"]),
                             ("mtls", *[f"spiffe://{mesh.TRUST_DOMAIN}/ns/{ns}/sa/default"] * 2))
            self.assertIn("over mTLS", countersign("explain", "pod", client, "-n", ns).stdout)
            kubectl("-n", ns, "apply", "-f", "-",
                    input="apiVersion: v1\nkind: Pod\n"
                          "metadata: {name: bare, labels: {countersign.dev/inject: disabled}}\n"
                          "spec: {terminationGracePeriodSeconds: 1, containers: [{name: app,"
                          f" image: {mesh.images.BOX}, imagePullPolicy: Never, args: [sleep, infinity]" "}]}")
            bare = explain("bare")
            self.assertEqual(bare.returncode, 1)
            self.assertIn("its label countersign.dev/inject is disabled", bare.stdout)
            self.assertIn("cannot read pod", countersign("explain", "pod", "nobody", "-n", ns).stderr)

    def test_strict_is_planned_by_the_plaintext_peers_seen_and_then_done(self):
        kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-mesh", "-p", '{"data":{"mode":"permissive"}}')
        try:
            with mesh.namespace("to-strict") as ns, mesh.namespace("still-plain", inject=False) as outside:
                deploy(ns, deployment("web", ["python3", "-m", "http.server", "8000"], port=8000))
                deploy(outside, deployment("old", ["sleep", "infinity"]))
                old = pod_of(outside, "old")
                call = lambda: run_in(outside, old, "curl", "-sSf", "-m", "5", f"http://web.{ns}:8000/etc/hosts",
                                      check=False)
                wait("plaintext to be taken", lambda: call().returncode == 0, 20)
                plan = lambda: json.loads(countersign("strict", "--plan", "-n", ns, "--output", "json").stdout)
                found = wait("the plan", lambda: (p := plan())["plaintext"] and p, 10)
                self.assertFalse(found["moved"])
                self.assertEqual((found["plaintext"][0]["peer"], found["plaintext"][0]["port"],
                                  found["plaintext"][0]["direction"]), (f"pod still-plain/{old}", "8000", "in"))
                refused = countersign("strict", "-n", ns)
                self.assertEqual(refused.returncode, 1)
                self.assertIn("nothing was changed", refused.stderr)
                self.assertEqual(call().returncode, 0)
                self.assertEqual(countersign("strict", "-n", ns, "--force").returncode, 0)
                wait("strict to hold", lambda: call().returncode != 0, 20)
                self.assertEqual(get("namespace", ns)["metadata"]["annotations"]["countersign.dev/mode"], "strict")
        finally:
            kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-mesh", "-p", '{"data":{"mode":"strict"}}')
        self.assertEqual(countersign("strict").returncode, 2)
