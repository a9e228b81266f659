"""From a pod without any mesh configuration to one with a sidecar."""
import json, subprocess as sp, unittest

import images, mesh
from mesh import get, kubectl, pods


def plain(name="web", extra=""):
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}{extra}}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{{name: app, image: {images.BOX}, imagePullPolicy: Never, args: [sleep, infinity],
                 securityContext: {{runAsUser: 1000}}}}]
"""


class Injection(unittest.TestCase):
    def submit(self, ns, text, check=True):
        return kubectl("-n", ns, "apply", "-f", "-", input=text, check=check)

    def test_10_11_a_pod_with_no_mesh_configuration_is_stored_with_redirect_and_sidecar(self):
        with mesh.namespace("inject") as ns:
            self.submit(ns, plain())
            stored = get("-n", ns, "pod", "web")["spec"]
            self.assertEqual([c["name"] for c in stored["initContainers"]],
                             ["countersign-redirect", "countersign-proxy"])
            self.assertEqual([c["name"] for c in stored["containers"]], ["app"])
            self.assertEqual(stored["containers"][0]["args"], ["sleep", "infinity"], "the app is as it was submitted")

    def test_16_the_pod_comes_up_with_the_sidecar_ready_before_the_app_starts(self):
        with mesh.namespace("comes-up") as ns:
            self.submit(ns, plain())
            kubectl("-n", ns, "wait", "pod/web", "--for=condition=Ready", "--timeout=60s")
            status = get("-n", ns, "pod", "web")["status"]
            proxy = next(c for c in status["initContainerStatuses"] if c["name"] == "countersign-proxy")
            self.assertTrue(proxy["ready"] and proxy["started"])
            self.assertLessEqual(proxy["state"]["running"]["startedAt"],
                                 status["containerStatuses"][0]["state"]["running"]["startedAt"])

    def test_a_pod_becomes_ready_without_a_warning_and_before_the_kubelet_knows_its_sidecar(self):
        with mesh.namespace("no-warning") as ns:
            mesh.wait("the namespace's CA", lambda: kubectl("-n", ns, "get", "configmap", "kube-root-ca.crt",
                                                            check=False).returncode == 0)
            for name in ("first", "second", "third"):
                self.submit(ns, plain(name=name))
                kubectl("-n", ns, "wait", f"pod/{name}", "--for=condition=Ready", "--timeout=60s")
            warnings = get("-n", ns, "events", "--field-selector=type=Warning")["items"]
            self.assertEqual([f"{e['involvedObject']['name']}: {e['reason']}: {e['message']}" for e in warnings], [])
            first = []
            for pod in get("-n", ns, "pods")["items"]:
                log = mesh.logs(mesh.NAMESPACE, mesh.agent_on(pod["spec"]["nodeName"]), "agent")
                lines = [l for l in log.splitlines() if "caller attested" in l and pod["metadata"]["uid"] in l]
                first.append(lines[0])
            # On a busy machine the kubelet may know a container before it asks.
            in_part = [line for line in first if "in_part=true" in line]
            self.assertTrue(in_part, f"no entry asks for the container: {first}")
            self.assertNotIn("k8s:container-", " ".join(in_part))

    def test_the_pods_label_wins_over_its_namespace(self):
        with mesh.namespace("label-wins") as ns:
            self.submit(ns, plain(extra=", labels: {countersign.dev/inject: disabled}"))
            self.assertNotIn("initContainers", get("-n", ns, "pod", "web")["spec"])
        with mesh.namespace("label-asks", inject=False) as ns:
            self.submit(ns, plain(extra=", labels: {countersign.dev/inject: enabled}"))
            self.assertIn("initContainers", get("-n", ns, "pod", "web")["spec"])
            self.submit(ns, plain(name="other"))
            self.assertNotIn("initContainers", get("-n", ns, "pod", "other")["spec"])

    def test_an_annotation_with_a_mistake_is_refused_and_named(self):
        with mesh.namespace("mistakes") as ns:
            for annotation, said in [("ignore-inbound-ports: '80, http'", "`http` is no port"),
                                     ("mode: loose", "`loose` is no mode"),
                                     ("ignore-outbound-cidrs: 10.0.0.0/99", "`10.0.0.0/99` is no CIDR"),
                                     ("memory-limit: lots", "`lots` is no quantity")]:
                done = self.submit(ns, plain(extra=f", annotations: {{countersign.dev/{annotation}}}"), check=False)
                self.assertNotEqual(done.returncode, 0)
                self.assertIn(said, done.stderr)
            done = self.submit(ns, plain().replace("runAsUser: 1000", "runAsUser: 2102"), check=False)
            self.assertIn("runs as UID 2102", done.stderr)

    def test_an_ephemeral_container_under_the_sidecars_user_is_refused(self):
        with mesh.namespace("debugged") as ns:
            self.submit(ns, plain())
            kubectl("-n", ns, "wait", "pod/web", "--for=condition=Ready", "--timeout=60s")
            def debug(name, uid):
                pod = get("-n", ns, "pod", "web")
                pod["spec"].setdefault("ephemeralContainers", []).append(
                    {"name": name, "image": images.BOX, "imagePullPolicy": "Never", "command": ["sleep", "infinity"],
                     "securityContext": {"runAsUser": uid}})
                return kubectl("replace", "--raw", f"/api/v1/namespaces/{ns}/pods/web/ephemeralcontainers", "-f", "-",
                               input=json.dumps(pod), check=False)
            refused = debug("sly", 2102)
            self.assertNotEqual(refused.returncode, 0)
            self.assertIn("runs as UID 2102", refused.stderr)
            self.assertEqual(debug("fair", 1000).returncode, 0)

    def test_lists_with_and_without_blanks_reach_the_redirect(self):
        with mesh.namespace("lists") as ns:
            annotations = ("countersign.dev/ignore-inbound-ports: '9090, 9091',"
                           " countersign.dev/ignore-outbound-cidrs: '10.8.0.0/16,10.9.0.0/16'")
            self.submit(ns, plain(extra=f", annotations: {{{annotations}}}"))
            args = get("-n", ns, "pod", "web")["spec"]["initContainers"][0]["args"]
            self.assertIn("--exclude-inbound-ports=15020,9090,9091", args)
            self.assertIn("--exclude-outbound-cidrs=10.8.0.0/16,10.9.0.0/16", args)

    def test_a_pod_on_its_nodes_network_and_the_control_plane_are_left_alone(self):
        with mesh.namespace("host-network") as ns:
            done = self.submit(ns, plain().replace("spec:\n", "spec:\n  hostNetwork: true\n"), check=False)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("uses its node's network", done.stderr, "the user is warned")
            self.assertNotIn("initContainers", get("-n", ns, "pod", "web")["spec"])
        for pod in pods(mesh.NAMESPACE, "app.kubernetes.io/name=countersign"):
            self.assertNotIn("initContainers", pod["spec"])

    def test_a_label_that_means_nothing_is_refused_and_never_passed_over(self):
        with mesh.namespace("unclear", inject=False) as ns:
            done = kubectl("label", "namespace", ns, "countersign.dev/inject=true", check=False)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("did you mean `enabled`?", done.stderr)
            done = kubectl("annotate", "namespace", ns, "countersign.dev/mode=stict", check=False)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("did you mean `strict`?", done.stderr)
            done = self.submit(ns, plain(extra=", labels: {countersign.dev/inject: enable}"), check=False)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("did you mean `enabled`?", done.stderr)

    def test_names_of_the_injection_and_exceptions_without_leave_are_refused(self):
        with mesh.namespace("reserved") as ns:
            volume = plain().replace("spec:\n", "spec:\n  volumes: [{name: countersign-agent, emptyDir: {}}]\n")
            self.assertIn("volume `countersign-agent`", self.submit(ns, volume, check=False).stderr)
            for annotation in ("ignore-inbound-ports: '8080'", "ignore-inbound-cidrs: 0.0.0.0/0",
                               "allow-udp-ports: '4433'"):
                done = self.submit(ns, plain(extra=f", annotations: {{countersign.dev/{annotation}}}"), check=False)
                self.assertNotEqual(done.returncode, 0, annotation)
                self.assertIn("mesh.allowExceptions", done.stderr)
        with mesh.namespace("excepted") as ns:
            self.submit(ns, plain(extra=", annotations: {countersign.dev/ignore-inbound-ports: '8080'}"))

    def test_a_pods_label_that_changed_since_frees_no_ephemeral_container(self):
        with mesh.namespace("relabelled") as ns:
            self.submit(ns, plain())
            kubectl("-n", ns, "label", "pod", "web", "countersign.dev/inject=disabled")

            def replaced(**more):
                pod = get("-n", ns, "pod", "web")
                pod["spec"]["ephemeralContainers"] = [{"name": "sly", "image": images.BOX, "imagePullPolicy": "Never",
                                                       "securityContext": {"runAsUser": 2102}}]
                pod["status"].update(more)
                return kubectl("replace", "--raw", f"/api/v1/namespaces/{ns}/pods/web/ephemeralcontainers", "-f", "-",
                               input=json.dumps(pod), check=False).stderr
            # It would run before the redirect. What the request says of the pod's status does not count.
            started = [{"name": "countersign-proxy", "started": True, "ready": True, "image": "", "imageID": "",
                        "restartCount": 0}]
            self.assertIn("the sidecar has not started", replaced(initContainerStatuses=started))
            kubectl("-n", ns, "wait", "pod/web", "--for=condition=Ready", "--timeout=60s")
            self.assertIn("runs as UID 2102", replaced())

    def test_sidecar_and_redirect_are_confined(self):
        with mesh.namespace("confined") as ns:
            self.submit(ns, plain())
            redirect, proxy = get("-n", ns, "pod", "web")["spec"]["initContainers"]
            self.assertEqual(redirect["securityContext"]["capabilities"], {"drop": ["ALL"], "add": ["NET_ADMIN"]})
            self.assertEqual(proxy["securityContext"]["capabilities"], {"drop": ["ALL"]})
            self.assertEqual(proxy["securityContext"]["runAsUser"], 2102)
            for container in (redirect, proxy):
                self.assertTrue(container["securityContext"]["readOnlyRootFilesystem"])
                self.assertEqual(container["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})
            kubectl("-n", ns, "wait", "pod/web", "--for=condition=Ready", "--timeout=60s")

    def test_inject_by_hand_gives_what_the_webhook_gives(self):
        made = sp.run([mesh.binary(), "inject", "-f", "-", "--mode", "strict", "--image", images.COUNTERSIGN,
                       "--image-pull-policy", "Never"],
                      input=plain(), text=True, stdout=sp.PIPE, stderr=sp.PIPE, check=True)
        self.assertIn("Pod web: injected", made.stderr)
        with mesh.namespace("by-hand") as ns:
            self.submit(ns, plain())
            by_webhook = get("-n", ns, "pod", "web")["spec"]
        with mesh.namespace("by-hand-2", inject=False) as ns:
            self.submit(ns, made.stdout)
            by_hand = get("-n", ns, "pod", "web")["spec"]
        bare = lambda spec: [{k: v for k, v in c.items() if k != "volumeMounts"} for c in spec["initContainers"]]
        self.assertEqual(bare(by_hand), bare(by_webhook))
        ours = lambda spec: [v for v in spec["volumes"] if v["name"] == "countersign-agent"]
        self.assertEqual(ours(by_hand), ours(by_webhook))
