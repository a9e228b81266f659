"""The chart in the hands of Helm itself, 3 and 4: the same objects as `countersign install`, a mesh that works, and a
clean end."""
import json, subprocess as sp, unittest

import binaries, cluster, images, mesh
from mesh import NAMESPACE, deploy, deployment, kubectl, pod_of, run_in, web
from suite.test_operator import countersign

CHART = images.ROOT / "charts" / "countersign"
SETTINGS = [f"image.name={images.COUNTERSIGN}", "image.pullPolicy=Never", "clusterName=test",
            "server.persistence.storageClass=local", "mesh.mode=strict"]
# A Helm that is built from its module does not know of which Kubernetes it is to think.
KUBERNETES = ["--kube-version", "1.34.0"]


def helm(version, *command, check=True):
    done = sp.run(cluster.operators("env", "HOME=/tmp", binaries.helm(version), *command), text=True,
                  capture_output=True, timeout=180)
    if check and done.returncode:
        raise AssertionError(f"helm {version} {' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done


def objects(manifests):
    """What some manifests say, by kind and name."""
    text = kubectl("create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-", input=manifests)
    decoder, found = json.JSONDecoder(), []
    while text := text.strip():
        one, end = decoder.raw_decode(text)
        found += one["items"] if one["kind"] == "List" else [one]
        text = text[end:]
    return {(o["kind"], o["metadata"]["name"]): o for o in found}


class Helm(unittest.TestCase):
    def settings(self, *more):
        return [a for s in (*SETTINGS, *more) for a in ("--set", s)]

    def test_the_chart_renders_to_what_install_prints(self):
        for more in ([], ["server.upstreamSecret=ca", "agent.nodesProxyPermission=true", "injector.replicas=3",
                          "injector.nativeSidecars=false"]):
            ours = objects(sp.check_output([mesh.binary(), "install", *self.settings(*more)], text=True))
            ours.pop(("Namespace", NAMESPACE))
            self.assertGreater(len(ours), 15)
            for version in binaries.HELM:
                theirs = objects(helm(version, "template", "countersign", CHART, "-n", NAMESPACE, "--include-crds",
                                      *KUBERNETES, *self.settings(*more)).stdout)
                self.assertEqual(sorted(theirs), sorted(ours))
                for key, wanted in ours.items():
                    self.assertEqual(theirs[key], wanted, f"{version}: {key}")
        for version in binaries.HELM:
            helm(version, "lint", "--strict", *KUBERNETES, CHART)
            refused = helm(version, "template", "countersign", CHART, *KUBERNETES, "--set", "mesh.mode=tight",
                           check=False)
            self.assertNotEqual(refused.returncode, 0, "the schema judges")
            self.assertIn("mode", refused.stderr)

    def test_a_mesh_of_each_helm_works_is_changed_without_a_restart_and_goes(self):
        self.assertNotEqual(kubectl("get", "namespace", NAMESPACE, "-o", "name", check=False).returncode, 0)
        for version in binaries.HELM:
            kubectl("delete", "pv", "countersign-data", "--ignore-not-found")
            for node in mesh.NODES:
                node.run("bash", "-c", "rm -rf /var/lib/countersign/*")
            mesh.apply(mesh.VOLUME)
            helm(version, "install", "countersign", CHART, "-n", NAMESPACE, "--create-namespace", *self.settings())
            mesh.ready()
            done = countersign("check")
            self.assertEqual(done.returncode, 0, done.stdout)
            with mesh.namespace(f"by-helm-{version[1]}") as ns:
                deploy(ns, web(), deployment("client", ["sleep", "infinity"]))
                self.assertEqual(run_in(ns, pod_of(ns, "client"), "curl", "-sSf", "-m", "10", "http://web:8080/"), "ok")
            running = lambda: sorted(p["metadata"]["uid"]
                                     for p in mesh.pods(NAMESPACE, "app.kubernetes.io/name=countersign"))
            before = running()
            helm(version, "upgrade", "countersign", CHART, "-n", NAMESPACE,
                 *self.settings("mesh.mode=permissive", "server.svidTTL=30m", "agent.workloadKeyType=ec-p384"))
            self.assertEqual(mesh.get("-n", NAMESPACE, "configmap", "countersign-mesh")["data"]["svidTTL"], "30m")
            mesh.ready()
            self.assertEqual(running(), before, "mode, TTLs and key types restart nothing")
            helm(version, "uninstall", "countersign", "-n", NAMESPACE)
            kubectl("delete", "namespace", NAMESPACE, "--timeout=90s")
            kubectl("delete", "crd", "spiffeids.spiffeid.spiffe.io", "--timeout=60s")
