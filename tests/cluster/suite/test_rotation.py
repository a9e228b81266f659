"""Below an upstream root, authorities and SVIDs rotate on the running cluster, and everything follows."""
import base64, json, subprocess as sp, tempfile, time, unittest

import mesh
from mesh import NAMESPACE, deploy, deployment, get, kubectl, pod_of, wait, web
from suite.test_bootstrap import certificates, configmap
from suite.test_traffic import Load


def holders():
    """What each node's agent holds."""
    return [i for n in mesh.NODES for i in mesh.agent_status(n.name)["identities"]]


def webhook_bundle():
    client = get("mutatingwebhookconfiguration", "countersign-injector")["webhooks"][0]["clientConfig"]
    return certificates(base64.b64decode(client["caBundle"]).decode())


class Rotation(unittest.TestCase):
    def test_27_29_the_own_root_is_replaced_under_load_and_everything_follows(self):
        show = lambda: json.loads(mesh.server("authority", "show", "--output=json"))
        with mesh.namespace("new-root") as ns:
            deploy(ns, web(replicas=2), deployment("client", ["sleep", "infinity"]))
            first = show()["active"]["id"]
            load = Load(ns, pod_of(ns, "client"), "web", 8080)
            mesh.server("authority", "prepare")
            mesh.server("authority", "activate")
            second = show()["active"]["id"]
            self.assertNotEqual(second, first)
            mesh.server("authority", "taint", "--id", first)
            wait("every SVID to be signed by the new root",
                 lambda: (h := holders()) and all(i["authority_id"] == second for i in h), 60)
            deploy(ns, web("fresh"))
            # The webhook works with its new certificate.
            mesh.reached(ns, pod_of(ns, "client"), "http://fresh:8080/")
            made, failed = load.end()
            self.assertEqual(failed, [])
            self.assertGreater(made, 200)
            # A revocation is what cuts: connections that were made under the old root end with it.
            both = certificates(configmap())
            mesh.server("authority", "revoke", "--id", first)
            root = certificates(mesh.server("bundle", "show"))
            self.assertLess(len(root), len(both))
            wait("the ConfigMap without the old root", lambda: certificates(configmap()) == root, 10)
            wait("the webhook without the old root", lambda: webhook_bundle() == root, 10)
            deploy(ns, web("fresher"))
            mesh.reached(ns, pod_of(ns, "client"), "http://fresher:8080/")

    def test_28_29_below_an_upstream_root_everything_follows_a_rotation_with_no_failed_request(self):
        with tempfile.TemporaryDirectory() as folder:
            sp.run("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout tls.key"
                   " -out tls.crt -subj /CN=upstream -addext basicConstraints=critical,CA:TRUE"
                   " -addext keyUsage=critical,keyCertSign,cRLSign",
                   shell=True, check=True, cwd=folder, stdout=sp.DEVNULL, stderr=sp.DEVNULL)
            kubectl("-n", NAMESPACE, "create", "secret", "tls", "upstream", f"--cert={folder}/tls.crt",
                    f"--key={folder}/tls.key")
            root = open(f"{folder}/tls.crt").read()
        # Everything starts anew: the trust root is another one.
        kubectl("-n", NAMESPACE, "delete", "statefulset/countersign-server", "--wait=true")
        kubectl("-n", NAMESPACE, "delete", "pvc", "data-countersign-server-0", "--wait=true")
        kubectl("delete", "pv", "countersign-data", "--wait=true")
        for node in mesh.NODES:
            node.run("bash", "-c", "rm -rf /var/lib/countersign/*")
        mesh.install("server.upstreamSecret=upstream", "server.caTTL=2m", "server.svidTTL=40s")
        wait("the new root in the ConfigMap", lambda: certificates(configmap()) == certificates(root), 30)
        mesh.delete_pods(NAMESPACE, "-l", "app.kubernetes.io/component=agent")
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
            wait("every SVID to be signed by it", lambda: all(i["authority_id"] == second for i in holders()), 60)
            deploy(ns, web("fresh"))
            # The webhook works with its new certificate.
            mesh.reached(ns, client, "http://fresh:8080/")
            time.sleep(max(0, 30 - (time.monotonic() - began)))
            made, failed = load.end()
            self.assertEqual(failed, [])
            self.assertGreater(made, 1000)
            self.assertEqual(webhook_bundle(), certificates(root), "below an upstream root the bundle is that root")
