"""Sidecars as plain containers, as clusters before 1.29 need them."""
import unittest

import mesh
from mesh import deploy, deployment, kubectl, pod_of
from suite.test_traffic import Load


class Plain(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        mesh.install("injector.nativeSidecars=false")

    @classmethod
    def tearDownClass(cls):
        mesh.install()

    def test_a_plain_sidecar_gates_its_pods_start_and_loses_no_request_in_a_rollout(self):
        with mesh.namespace("plain-sidecars") as ns:
            probe = """readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
          lifecycle: {preStop: {exec: {command: [sleep, '3']}}}"""
            app = deployment("web",
                             ["bash", "-c", f"{mesh.NGINX} & trap 'nginx -c /tmp/n.conf -s quit' TERM; wait; wait"],
                             replicas=2, port=8080, container=probe, grace=20)
            deploy(ns, app, deployment("client", ["sleep", "infinity"]))
            pod = mesh.pods(ns, "app=web")[0]
            self.assertEqual([c["name"] for c in pod["spec"]["initContainers"]], ["countersign-redirect"])
            self.assertEqual([c["name"] for c in pod["spec"]["containers"]], ["countersign-proxy", "app"])
            started = {c["name"]: c["state"]["running"]["startedAt"] for c in pod["status"]["containerStatuses"]}
            self.assertLessEqual(started["countersign-proxy"], started["app"])
            uid, agent = pod["metadata"]["uid"], mesh.agent_on(pod["spec"]["nodeName"])
            lines = [l for l in mesh.logs(mesh.NAMESPACE, agent, "agent").splitlines() if "caller attested" in l
                     and uid in l]
            self.assertIn("in_part=true", lines[0], "while the gate holds, the kubelet knows the pod alone")
            mesh.wait("the container to be attested too",
                      lambda: [l for l in mesh.logs(mesh.NAMESPACE, agent, "agent").splitlines()
                      if uid in l and "in_part=false" in l and "k8s:container-name:countersign-proxy" in l], 40)
            load = Load(ns, pod_of(ns, "client"), "web", 8080)
            kubectl("-n", ns, "rollout", "restart", "deployment/web")
            kubectl("-n", ns, "rollout", "status", "deployment/web", "--timeout=90s")
            made, failed = load.end()
            self.assertEqual(failed, [])
            self.assertGreater(made, 100)
            line = next(l for l in mesh.logs(ns, pod_of(ns, "client"), "countersign-proxy").splitlines()
                        if '"mode":"mtls"' in l)
            self.assertIn(f"spiffe://{mesh.TRUST_DOMAIN}/ns/{ns}/sa/default", line)

    def test_what_ends_by_itself_is_refused_with_what_to_do(self):
        with mesh.namespace("plain-jobs") as ns:
            pod = ("apiVersion: v1\nkind: Pod\nmetadata: {name: once}\nspec: {restartPolicy: Never,"
                   f" containers: [{{name: app, image: {mesh.images.BOX}, args: ['true']}}]" "}")
            done = kubectl("-n", ns, "apply", "-f", "-", input=pod, check=False)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("would go on for ever", done.stderr)
            self.assertIn("countersign.dev/inject: disabled", done.stderr)
