"""`countersign support`: what a supporter needs, and no secret."""
import json, os, pathlib, tarfile, tempfile, unittest

import mesh
from mesh import NAMESPACE, deploy, deployment, kubectl, pod_of
from suite.test_operator import countersign, user

CANARY = "k7Qz-canary"


def parts(path):
    """The parts of an archive by name, without the folder that all are in."""
    with tarfile.open(path) as archive:
        return {m.name.split("/", 1)[1]: archive.extractfile(m).read().decode() for m in archive.getmembers()}


class Support(unittest.TestCase):
    def test_an_archive_tells_of_the_mesh_and_of_no_secret(self):
        with mesh.namespace("supported") as ns, tempfile.TemporaryDirectory() as folder:
            kubectl("-n", ns, "create", "secret", "generic", "hidden", f"--from-literal=a={CANARY}")
            probe = (f"readinessProbe: {{httpGet: {{path: '/?t={CANARY}', port: 8080,"
                     f" httpHeaders: [{{name: X-Key, value: {CANARY}}}]}}, periodSeconds: 1}}")
            deploy(ns, deployment("web", ["bash", "-c", f": {CANARY}; {mesh.NGINX}"], port=8080,
                                  container=f"env: [{{name: PASSWORD, value: {CANARY}}}]\n          {probe}"))
            pod = pod_of(ns, "web")
            # What the sidecar runs the app's probes by, and whoever knows it can have them run.
            sidecar = mesh.get("-n", ns, "pod", pod)["spec"]["initContainers"][1]
            probes = next(e["value"] for e in sidecar["env"] if e["name"] == "COUNTERSIGN_PROBES")
            secret = next(iter(json.loads(probes))).split("/")[0]
            self.assertGreater(len(secret), 10)
            kubectl("-n", ns, "annotate", "pod", pod, f"example.org/note={CANARY}")
            out = pathlib.Path(folder) / "s.tar.gz"
            done = countersign("support", "--out", out, "--pod", f"{ns}/{pod}", "--pod", f"{ns}/none",
                               "--output", "json")
            # One of the pods is not there, which is said; everything else is in the archive.
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertIn(f"without a pod that you named: pod {ns}/none: ", done.stderr)
            told = json.loads(done.stdout)
            self.assertEqual(os.stat(out).st_mode & 0o777, 0o600)
            found = parts(out)
            self.assertEqual(told["parts"], len(found) - 1, "left-out.txt is no part")
            for name, words in {
                "versions.json": "v1.34",
                "check.json": "webhook's caBundle",
                "objects/statefulsets.json": "--trust-domain=cluster.local",
                "objects/spiffeids.json": pod,
                "objects/customresourcedefinitions.json": "spiffeids.spiffeid.spiffe.io",
                f"logs/{NAMESPACE}/countersign-server-0/server.log": "countersign",
                f"logs/{ns}/{pod}/countersign-proxy.log": "sidecar ready",
                "pages/countersign-server-0/metrics-metrics.txt": "countersign_server_",
                "pages/countersign-server-0/metrics-ready.txt": "ready",
                "sidecars.json": f"/ns/{ns}/sa/default",
                "meshed-pods.json": pod,
                f"pods/{ns}/{pod}/explain.json": "attestation",
                f"pods/{ns}/{pod}/events.json": "Started",
                "left-out.txt": "Secrets: never taken",
            }.items():
                self.assertIn(words, found.get(name, f"{name} is missing"), name)
            self.assertIn(f"pod {ns}/none: ", found["left-out.txt"])
            for name, text in found.items():
                self.assertNotIn(CANARY, text, name)
                self.assertNotIn(secret, text, name)
                if name.endswith(".json"):
                    json.loads(text)
                self.assertNotIn("PRIVATE KEY", text, name)
                self.assertNotRegex(text, r"/probe/[A-Za-z0-9]", name)
            again = countersign("support", "--out", out)
            self.assertEqual(again.returncode, 2, again.stdout)
            self.assertIn("name another file with --out", again.stderr)

    def test_what_a_user_may_not_see_is_named_in_the_archive(self):
        with tempfile.TemporaryDirectory() as folder, user("supporter", "get,list pods") as theirs:
            out = f"{folder}/s.tar.gz"
            done = theirs("support", "--out", out)
            self.assertEqual(done.returncode, 0, done.stderr)
            found = parts(out)
            self.assertIn("countersign-server-0", found["objects/pods.json"])
            self.assertRegex(found["left-out.txt"], r'nodes: nodes is forbidden: User "supporter"')
            self.assertNotIn("Status {", found["left-out.txt"])
            wrong = theirs("support", "--out", f"{folder}/t.tar.gz", "--pod", "web")
            self.assertEqual((wrong.returncode, pathlib.Path(f"{folder}/t.tar.gz").exists()), (2, False))
            self.assertIn("`web` is not NAMESPACE/NAME", wrong.stderr)
