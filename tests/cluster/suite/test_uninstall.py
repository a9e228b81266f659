"""The way out. Last of all: it leaves a cluster without Countersign."""
import subprocess as sp, time, unittest

import cluster, mesh
from mesh import deploy, deployment, get, kubectl, pod_of, run_in, wait, web
from suite.test_csi import DRIVER
from suite.test_operator import countersign
from suite.test_repair import found
from suite.test_traffic import Load


def without_driver():
    """The mesh that a cluster has whose pods mount the agent's folder from their node."""
    held = lambda: [p for p in get("-A", "pods")["items"] if any("csi" in v for v in p["spec"].get("volumes", []))]
    wait("the end of other tests' pods", lambda: not held(), 120)
    mesh.install("agent.csi.enabled=false")
    kubectl("delete", "csidriver", DRIVER)


def anew(*settings):
    """The mesh on a cluster that has none."""
    kubectl("delete", "pv", "countersign-data", "--ignore-not-found")
    for node in mesh.NODES:
        node.run("bash", "-c", "rm -rf /var/lib/countersign/*")
    mesh.install(*settings)


class Uninstall(unittest.TestCase):
    def nothing_is_left(self):
        left = kubectl("get", "all,configmaps,secrets,serviceaccounts,roles,rolebindings,pvc,pdb,leases", "-A", "-l",
                       "app.kubernetes.io/name=countersign", "-o", "name")
        left += kubectl("get", "clusterroles,clusterrolebindings,mutatingwebhookconfigurations,crds,namespaces,"
                        "csidrivers,validatingadmissionpolicies,validatingadmissionpolicybindings", "-o", "name")
        self.assertEqual([line for line in left.splitlines() if "countersign" in line or "spiffeid" in line], [])

    def restarted_pods_are_plain(self, ns):
        kubectl("-n", ns, "rollout", "restart", "deployment/web", "deployment/client")
        for name in ("web", "client"):
            kubectl("-n", ns, "rollout", "status", f"deployment/{name}", "--timeout=90s")
        for app in ("web", "client"):
            for pod in mesh.pods(ns, f"app={app}"):
                self.assertNotIn("initContainers", pod["spec"], "as before")
        self.assertEqual(run_in(ns, pod_of(ns, "client"), "curl", "-sSf", "-m", "5", "http://web:8080/"), "ok")

    def test_1_without_the_driver_it_loses_no_request_and_leaves_nothing(self):
        refused = countersign("uninstall")
        self.assertEqual(refused.returncode, 2)
        self.assertIn("--yes", refused.stderr)
        self.assertIn("no installation in namespace `elsewhere`",
                      countersign("uninstall", "--yes", "-n", "elsewhere").stderr)
        without_driver()
        off = found()["CSI driver"]
        self.assertEqual((off["ok"], "root on a node" in off["found"]), (True, True))
        with mesh.namespace("stays") as ns:
            deploy(ns, web(replicas=2), deployment("client", ["sleep", "infinity"]))
            # The mesh is strict. Several loads, because one sidecar is a step ahead of another for moments only.
            loads = [Load(ns, pod_of(ns, "client"), "web", 8080) for _ in range(4)]
            done = countersign("uninstall", "--yes")
            self.assertEqual(done.returncode, 0, done.stderr)
            steps = [line for line in done.stderr.splitlines() if "plaintext" in line and "waiting" not in line]
            self.assertEqual(steps, ["the sidecars are told to accept plaintext", "all sidecars accept plaintext",
                                     "the sidecars are told to send plaintext", "all sidecars send plaintext"])
            for made, failed in [load.end() for load in loads]:
                self.assertEqual(failed, [])
                self.assertGreater(made, 100)
            self.assertIn("kubectl delete pv countersign-data", done.stderr)
            self.assertRegex(done.stderr, rf"idle sidecars of .*\b{ns} 3")
            self.nothing_is_left()
            self.restarted_pods_are_plain(ns)

    def test_2_with_the_driver_the_pods_are_restarted_before_it_goes(self):
        anew("mesh.mode=permissive")
        with mesh.namespace("restarts") as ns:
            deploy(ns, web(replicas=2), deployment("client", ["sleep", "infinity"]))
            # A port may be stricter than its pod, and refuses plaintext until it is told.
            kubectl("-n", ns, "annotate", "pods", "-l", "app=web", "countersign.dev/port-modes=8080=strict")
            modes = lambda pod: mesh.pod_page(pod["metadata"]["name"], 15020, "/mode", ns)
            for pod in mesh.pods(ns, "app=web"):
                wait("the strict port", lambda: modes(pod) == "permissive\n8080 strict\n", 20)
            load = Load(ns, pod_of(ns, "client"), "web", 8080)
            held = f"3 pods with a volume of the CSI driver (by namespace: {ns} 3)"
            prepared = countersign("uninstall", "--yes", "--prepare")
            self.assertEqual(prepared.returncode, 0, prepared.stderr)
            self.assertIn(f"There are {held}: restart them", prepared.stderr)
            for pod in mesh.pods(ns, "app in (web,client)"):
                self.assertEqual(modes(pod), "off\n")
            early = countersign("uninstall", "--yes", "--patience", "3")
            self.assertEqual(early.returncode, 1, early.stderr)
            self.assertIn(f"there are still {held}", early.stderr)
            mesh.ready()
            made, failed = load.end()
            self.assertEqual(failed, [])
            self.assertGreater(made, 100)
            # The pods are restarted while it waits.
            command = cluster.operators(mesh.binary(), "uninstall", "--yes")
            with sp.Popen(command, text=True, stdout=sp.DEVNULL, stderr=sp.PIPE) as going:
                began, said = time.monotonic(), ""
                # It has looked at the pods before they are restarted.
                while "They could never end" not in said and (line := going.stderr.readline()):
                    said += line
                self.restarted_pods_are_plain(ns)
                said += going.communicate(timeout=300)[1]
            self.assertEqual(going.returncode, 0, said)
            self.assertIn(f"there are {held}. They could never end without it", said)
            print(f"uninstalled in {time.monotonic() - began:.0f} s, with the restarts", flush=True)
            self.nothing_is_left()
