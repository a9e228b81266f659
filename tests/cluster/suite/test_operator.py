"""What an operator asks of a running mesh."""
import json, subprocess as sp, unittest

import cluster, mesh
from mesh import NAMESPACE, deploy, deployment, get, kubectl, pod_of, run_in, wait


def countersign(*command):
    """A command of an operator with the cluster's KUBECONFIG."""
    return sp.run(cluster.operators(mesh.binary(), *command), text=True, capture_output=True)


class Operator(unittest.TestCase):
    def check(self, *flags):
        done = countersign("check", "--output", "json", *flags)
        told = json.loads(done.stdout) if done.stdout else self.fail(done.stderr)
        self.assertEqual(done.returncode, 0 if told["ok"] else 1)
        return {c["check"]: c for c in told["checks"]}

    def test_check_is_green_on_a_mesh_that_is_well_and_names_what_is_not(self):
        found = wait("a green check", lambda: (c := self.check()) and all(x["ok"] for x in c.values()) and c, 30)
        self.assertEqual(len(found), 11)
        self.assertEqual(set(self.check("--before")), {"API version", "permissions", "clocks"})
        # An agent that is away is named with its node, and what mends it.
        kubectl("label", "node", "node2", "test/no-agent=true")
        kubectl("-n", NAMESPACE, "patch", "daemonset", "countersign-agent", "--type=strategic", "-p", json.dumps({"spec": {"template": {"spec": {"affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [{"key": "test/no-agent", "operator": "DoesNotExist"}]}]}}}}}}}))
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
            deploy(ns, deployment("web", ["python3", "-m", "http.server", "8000"], port=8000), deployment("client", ["sleep", "infinity"]))
            client = pod_of(ns, "client")
            run_in(ns, client, "curl", "-sSf", "-m", "10", "http://web:8000/etc/hosts")
            explain = lambda pod: countersign("explain", "pod", pod, "-n", ns, "--output", "json")
            told = wait("its connection", lambda: (t := json.loads(explain(client).stdout))["connections"] and t, 10)
            self.assertTrue(told["ok"], told)
            self.assertEqual([s["step"] for s in told["steps"]], ["injection", "registration", "agent", "attestation", "SVID", "mode", "handshakes"])
            last = told["connections"][-1]
            self.assertEqual((last["mode"], last["source_id"], last["destination_id"]), ("mtls", *[f"spiffe://{mesh.TRUST_DOMAIN}/ns/{ns}/sa/default"] * 2))
            self.assertIn("over mTLS", countersign("explain", "pod", client, "-n", ns).stdout)
            kubectl("-n", ns, "apply", "-f", "-", input=f"apiVersion: v1\nkind: Pod\nmetadata: {{name: bare, labels: {{countersign.dev/inject: disabled}}}}\nspec: {{terminationGracePeriodSeconds: 1, containers: [{{name: app, image: {mesh.images.BOX}, imagePullPolicy: Never, args: [sleep, infinity]}}]}}")
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
                call = lambda: run_in(outside, old, "curl", "-sSf", "-m", "5", f"http://web.{ns}:8000/etc/hosts", check=False)
                wait("plaintext to be taken", lambda: call().returncode == 0, 20)
                plan = lambda: json.loads(countersign("strict", "--plan", "-n", ns, "--output", "json").stdout)
                found = wait("the plan", lambda: (p := plan())["plaintext"] and p, 10)
                self.assertFalse(found["moved"])
                self.assertEqual((found["plaintext"][0]["peer"], found["plaintext"][0]["port"], found["plaintext"][0]["direction"]), (f"pod still-plain/{old}", "8000", "in"))
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
