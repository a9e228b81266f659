"""Below an upstream root, authorities and SVIDs rotate on the running cluster, and everything follows."""
import base64, json, subprocess as sp, tempfile, time, unittest

import mesh
from mesh import NAMESPACE, deploy, deployment, get, kubectl, pod_of, run_in, wait, web
from suite.test_bootstrap import certificates, configmap
from suite.test_traffic import Load


class Rotation(unittest.TestCase):
    def test_28_29_below_an_upstream_root_everything_follows_a_rotation_with_no_failed_request(self):
        with tempfile.TemporaryDirectory() as folder:
            sp.run("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout tls.key -out tls.crt -subj /CN=upstream"
                   " -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign", shell=True, check=True, cwd=folder,
                   stdout=sp.DEVNULL, stderr=sp.DEVNULL)
            kubectl("-n", NAMESPACE, "create", "secret", "tls", "upstream", f"--cert={folder}/tls.crt", f"--key={folder}/tls.key")
            root = open(f"{folder}/tls.crt").read()
        # Everything starts anew: the trust root is another one.
        kubectl("-n", NAMESPACE, "delete", "statefulset/countersign-server", "--wait=true")
        kubectl("-n", NAMESPACE, "delete", "pvc", "data-countersign-server-0", "--wait=true")
        kubectl("delete", "pv", "countersign-data", "--wait=true")
        for node in mesh.NODES:
            node.run("bash", "-c", "rm -rf /var/lib/countersign/*")
        mesh.install("server.upstreamSecret=upstream", "server.caTTL=3m", "server.svidTTL=40s")
        wait("the new root in the ConfigMap", lambda: certificates(configmap()) == certificates(root), 30)
        kubectl("-n", NAMESPACE, "delete", "pods", "-l", "app.kubernetes.io/component=agent")
        kubectl("-n", NAMESPACE, "rollout", "restart", "deployment/countersign-injector")
        mesh.ready()
        with mesh.namespace("rotation") as ns:
            deploy(ns, web(replicas=2), deployment("client", ["sleep", "infinity"]))
            client = pod_of(ns, "client")
            show = lambda: json.loads(mesh.server("authority", "show", "--output=json"))
            first = show()["active"]["id"]
            load = Load(ns, client, "web", 8080)
            began = time.monotonic()
            # Until a second rotation by the clock: TTL / 6 before its end the prepared authority signs.
            second = wait("an authority of its own accord", lambda: (i := show()["active"]["id"]) != first and i, 200)
            holders = lambda: [i for n in mesh.NODES for i in mesh.agent_status(n.name)["identities"]]
            wait("every SVID to be signed by it", lambda: all(i["authority_id"] == second for i in holders()), 60)
            deploy(ns, web("fresh"))
            self.assertEqual(run_in(ns, client, "curl", "-sSf", "-m", "5", "http://fresh:8080/"), "ok", "the webhook works with its new certificate")
            time.sleep(max(0, 30 - (time.monotonic() - began)))
            made, failed = load.end()
            self.assertEqual(failed, [])
            self.assertGreater(made, 1000)
            hook = get("mutatingwebhookconfiguration", "countersign-injector")["webhooks"][0]["clientConfig"]["caBundle"]
            self.assertEqual(certificates(base64.b64decode(hook).decode()), certificates(root), "below an upstream root the bundle is that root")
