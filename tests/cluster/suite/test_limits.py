"""Namespaces with limits of their own, ResourceQuota, LimitRange and Pod Security: meshed pods run where annotations
say enough, and `check` names what is missing and where."""
import json, unittest

import mesh
from mesh import deploy, deployment, get, kubectl, pods, wait, web
from suite.test_injection import plain
from suite.test_operator import countersign

QUOTA = """
apiVersion: v1
kind: ResourceQuota
metadata: {name: team}
spec: {hard: {limits.cpu: "2", limits.memory: 1Gi, requests.cpu: "1", requests.memory: 512Mi, pods: "5"}}
"""
RANGE = """
apiVersion: v1
kind: LimitRange
metadata: {name: bounds}
spec:
  limits:
    - type: Container
      min: {cpu: 50m, memory: 32Mi}
      max: {cpu: "1", memory: 128Mi}
      maxLimitRequestRatio: {memory: "4"}
"""
# What the app itself needs there.
APP = "resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {cpu: 100m, memory: 64Mi}}"


def annotated(manifest, **annotations):
    """A deployment's manifest with annotations of ours on its pods."""
    notes = json.dumps({f"countersign.dev/{key.replace('_', '-')}": value for key, value in annotations.items()})
    return manifest.replace("    metadata: {labels:", f"    metadata: {{annotations: {notes}, labels:", 1)


def checked(name):
    """The findings of a check of `check`, for it may have several."""
    return [c for c in json.loads(countersign("check", "--output", "json").stdout)["checks"] if c["check"] == name]


def resources(ns, app):
    spec = pods(ns, f"app={app}")[0]["spec"]
    return {c["name"]: c["resources"] for c in spec["initContainers"]}


class Limits(unittest.TestCase):
    def refusals(self, ns):
        return [c for c in checked("limits") if not c["ok"] and f"namespace {ns}," in c["found"]]

    def event(self, ns):
        """Why the API server refuses the pods of a ReplicaSet."""
        events = lambda: [e["message"] for e in get("-n", ns, "events")["items"] if e["reason"] == "FailedCreate"]
        return wait("the refusal", events, 30)[0]

    def app(self, **annotations):
        return annotated(deployment("app", ["sleep", "infinity"], container=APP), **annotations)

    def test_a_namespace_with_a_quota_is_meshed_by_two_annotations_that_check_names(self):
        with mesh.namespace("quota") as ns:
            kubectl("-n", ns, "apply", "-f", "-", input=QUOTA)
            kubectl("-n", ns, "apply", "-f", "-", input=self.app())
            said = self.event(ns)
            self.assertIn("must specify limits.cpu for: countersign-proxy,countersign-redirect", said)
            found = self.refusals(ns)
            self.assertEqual([c["found"] for c in found],
                             [f"namespace quota, deployment app: ResourceQuota team refuses {container}: it has no cpu"
                              " limit, which the quota requires"
                              for container in ("countersign-proxy", "countersign-redirect")])
            for finding, setting in zip(found, ("cpu-limit", "redirect-cpu-limit")):
                self.assertIn(f"countersign.dev/{setting},", finding["mend"])
            deploy(ns, self.app(cpu_limit="200m", redirect_cpu_limit="0.2"))
            self.assertEqual(resources(ns, "app")["countersign-redirect"]["limits"], {"cpu": "200m", "memory": "64Mi"})
            self.assertEqual(self.refusals(ns), [])
            used = get("-n", ns, "resourcequota", "team")["status"]["used"]
            self.assertEqual((used["limits.cpu"], used["pods"]), ("300m", "1"), "app and sidecar")

    def test_a_namespace_with_bounds_is_meshed_by_annotations_within_them(self):
        with mesh.namespace("bounds") as ns:
            kubectl("-n", ns, "apply", "-f", "-", input=RANGE)
            kubectl("-n", ns, "apply", "-f", "-", input=self.app())
            self.assertIn("minimum cpu usage per Container is 50m, but request is 10m", self.event(ns))
            found = {(c["found"].split(" refuses ")[1], c["mend"].split("countersign.dev/")[1].split(",")[0])
                     for c in self.refusals(ns)}
            proxy, redirect = "countersign-proxy: its ", "countersign-redirect: its "
            self.assertEqual(found, {
                (proxy + "cpu request 10m is below the minimum 50m", "cpu-request"),
                (proxy + "memory request 16Mi is below the minimum 32Mi", "memory-request"),
                (proxy + "memory limit 256Mi is above the maximum 128Mi", "memory-limit"),
                (proxy + "memory limit 256Mi is more than 4 times the request 16Mi", "memory-limit"),
                (redirect + "cpu request 10m is below the minimum 50m", "redirect-cpu-request"),
                (redirect + "memory request 16Mi is below the minimum 32Mi", "redirect-memory-request")})
            deploy(ns, self.app(cpu_request="50m", memory_request="32Mi", memory_limit="128Mi",
                                redirect_cpu_request="50m", redirect_memory_request="32Mi"))
            self.assertEqual(self.refusals(ns), [])
            proxy = resources(ns, "app")["countersign-proxy"]
            self.assertEqual(proxy, {"requests": {"cpu": "50m", "memory": "32Mi"},
                                     "limits": {"cpu": "1", "memory": "128Mi"}}, "its cpu limit is the LimitRange's")

    def test_a_default_limit_of_the_namespace_stays_on_the_containers_that_have_none(self):
        with mesh.namespace("defaulted") as ns:
            limits = RANGE[:RANGE.index("      min:")] + "      default: {cpu: 500m}\n      max: {cpu: '1'}\n"
            kubectl("-n", ns, "apply", "-f", "-", input=limits)
            kubectl("-n", ns, "apply", "-f", "-", input=QUOTA)
            self.assertEqual(self.refusals(ns), [], "the default is what the quota requires")
            deploy(ns, self.app())
            for container in resources(ns, "app").values():
                self.assertEqual((container["requests"]["cpu"], container["limits"]["cpu"]), ("10m", "500m"))

    def test_a_default_limit_follows_the_request_and_values_that_cannot_be_are_refused(self):
        with mesh.namespace("amounts") as ns:
            deploy(ns, annotated(web(), memory_request="300Mi", redirect_memory_request="70Mi"))
            found = resources(ns, "web")
            self.assertEqual(found["countersign-proxy"]["limits"], {"memory": "300Mi"})
            self.assertEqual(found["countersign-redirect"]["limits"], {"memory": "70Mi"})
            for key, value, said in [
                    ("memory-limit", "8Mi", "`8Mi` is below the request of 16Mi: raise it, or lower"
                                            " countersign.dev/memory-request"),
                    ("redirect-cpu-limit", "9m", "`9m` is below the request of 10m: raise it, or lower"
                                                 " countersign.dev/redirect-cpu-request"),
                    ("cpu-limit", "-1", "`-1` is no quantity of a resource: it is negative"),
                    ("redirect-memory-limit", "lots", "`lots` is no quantity, such as 100m or 64Mi"),
                    ("cpu-request", "8Ei", "`8Ei` is no quantity of a resource: it is 2^63 or more"),
                    ("redirect-cpu", "1", "`1` is set on an annotation that does not exist")]:
                pod = plain(name="wrong", extra=f', annotations: {{countersign.dev/{key}: "{value}"}}')
                done = kubectl("-n", ns, "apply", "-f", "-", input=pod, check=False)
                self.assertNotEqual(done.returncode, 0, key)
                self.assertIn(f"annotation countersign.dev/{key}: {said}", done.stderr)

    def test_a_level_of_pod_security_that_refuses_meshed_pods_is_warned_of_and_found(self):
        level = "pod-security.kubernetes.io/enforce"
        with mesh.namespace("leveled") as ns:
            done = kubectl("label", "namespace", ns, f"{level}=baseline", check=False)
            self.assertEqual(done.returncode, 0)
            self.assertIn("countersign: Pod Security `baseline` refuses meshed pods, which need", done.stderr)
            (finding,) = checked("pod security")
            self.assertFalse(finding["ok"])
            self.assertIn("leveled (baseline)", finding["found"])
            done = kubectl("-n", ns, "apply", "-f", "-", input=plain(), check=False)
            self.assertIn("violates PodSecurity", done.stderr)
            kubectl("label", "namespace", ns, f"{level}=privileged", "--overwrite")
            self.assertNotIn("leveled", checked("pod security")[0]["found"])
            kubectl("-n", ns, "apply", "-f", "-", input=plain())
