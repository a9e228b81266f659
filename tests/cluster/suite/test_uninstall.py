"""The way out. Last of all: it leaves a cluster without Countersign."""
import unittest

import mesh
from mesh import deploy, deployment, kubectl, pod_of, run_in, web
from suite.test_operator import countersign
from suite.test_traffic import Load


class Uninstall(unittest.TestCase):
    def test_uninstall_loses_no_request_and_leaves_nothing(self):
        refused = countersign("uninstall")
        self.assertEqual(refused.returncode, 2)
        self.assertIn("--yes", refused.stderr)
        self.assertIn("no installation in namespace `elsewhere`",
                      countersign("uninstall", "--yes", "-n", "elsewhere").stderr)
        kubectl("create", "namespace", "stays")
        kubectl("label", "namespace", "stays", "countersign.dev/inject=enabled")
        deploy("stays", web(replicas=2), deployment("client", ["sleep", "infinity"]))
        load = Load("stays", pod_of("stays", "client"), "web", 8080)
        done = countersign("uninstall", "--yes")
        self.assertEqual(done.returncode, 0, done.stderr)
        made, failed = load.end()
        self.assertEqual(failed, [])
        self.assertGreater(made, 100)
        left = kubectl("get", "all,configmaps,secrets,serviceaccounts,roles,rolebindings,pvc,pdb,leases", "-A", "-l",
                       "app.kubernetes.io/name=countersign", "-o", "name")
        left += kubectl("get", "clusterroles,clusterrolebindings,mutatingwebhookconfigurations,crds,namespaces,"
                        "validatingadmissionpolicies,validatingadmissionpolicybindings", "-o", "name")
        self.assertEqual([line for line in left.splitlines() if "countersign" in line or "spiffeid" in line], [])
        kubectl("-n", "stays", "rollout", "restart", "deployment/web", "deployment/client")
        for name in ("web", "client"):
            kubectl("-n", "stays", "rollout", "status", f"deployment/{name}", "--timeout=60s")
        for app in ("web", "client"):
            for pod in mesh.pods("stays", f"app={app}"):
                self.assertNotIn("initContainers", pod["spec"], "as before")
        self.assertEqual(run_in("stays", pod_of("stays", "client"), "curl", "-sSf", "-m", "5", "http://web:8080/"),
                         "ok")
