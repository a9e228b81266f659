"""What stands in the cluster after an installation, and how server and agents come to trust each other."""
import base64, json, re, subprocess as sp, unittest

import cluster, images, mesh
from mesh import NAMESPACE, get, kubectl, pods, wait


def configmap():
    return get("-n", NAMESPACE, "configmap", "countersign-bundle")["data"]["bundle.crt"]


def certificates(pem):
    return sorted(re.findall(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----", pem))


class Bootstrap(unittest.TestCase):
    def test_03_the_ca_is_a_statefulset_with_the_registrar_beside_it_on_a_unix_socket(self):
        server = get("-n", NAMESPACE, "statefulset", "countersign-server")["spec"]["template"]["spec"]
        self.assertEqual([c["name"] for c in server["containers"]], ["server", "registrar"])
        volumes = {v["name"]: v for v in server["volumes"]}
        for container in server["containers"]:
            self.assertIn("socket", [m["name"] for m in container["volumeMounts"]])
        self.assertIn("emptyDir", volumes["socket"])

    def test_the_control_plane_and_the_sidecar_meet_pod_security_restricted(self):
        # A meshed pod as a whole does not: its redirect needs NET_ADMIN.
        apply = lambda ns, name, spec: kubectl(
            "-n", ns, "create", "--dry-run=server", "-f", "-", check=False,
            input=json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
                              "spec": {**spec, "serviceAccountName": "default"}}))
        with mesh.namespace("restricted", inject=False) as ns, mesh.namespace("sample") as sample:
            kubectl("label", "namespace", ns, "pod-security.kubernetes.io/enforce=restricted")
            server = get("-n", NAMESPACE, "statefulset", "countersign-server")["spec"]["template"]["spec"]
            server["volumes"].append({"name": "data", "emptyDir": {}})
            injector = get("-n", NAMESPACE, "deployment", "countersign-injector")["spec"]["template"]["spec"]
            mesh.deploy(sample, mesh.deployment("web", ["sleep", "infinity"]))
            pod = pods(sample, "app=web")[0]["spec"]
            redirect, proxy = pod["initContainers"]
            sidecar = {"containers": [{k: v for k, v in proxy.items() if k != "restartPolicy"}],
                       "volumes": [v for v in pod["volumes"] if v["name"] == "countersign-agent"]}
            self.assertIn("csi", sidecar["volumes"][0])
            for name, spec in [("server", server), ("injector", injector), ("sidecar", sidecar)]:
                kept = {v["name"] for v in spec["volumes"]}
                for container in spec["containers"]:
                    container["volumeMounts"] = [m for m in container.get("volumeMounts", []) if m["name"] in kept]
                done = apply(ns, name, spec)
                self.assertEqual(done.returncode, 0, done.stderr)
            refused = apply(ns, "redirect", {"containers": [{**redirect, "volumeMounts": []}]})
            self.assertIn("restricted", refused.stderr, "the level can refuse: NET_ADMIN")

    def test_06_one_agent_runs_on_each_node(self):
        agents = pods(NAMESPACE, "app.kubernetes.io/component=agent")
        self.assertEqual(sorted(a["spec"]["nodeName"] for a in agents), [n.name for n in cluster.NODES])
        nodes = {n["metadata"]["name"]: n["metadata"]["uid"] for n in get("nodes")["items"]}
        for name, uid in nodes.items():
            own = mesh.agent_status(name)["facts"]["agent ID"]
            self.assertEqual(own, f"spiffe://{mesh.TRUST_DOMAIN}/spire/agent/k8s_psat/test/{uid}")

    def test_13_no_tcp_port_of_the_server_takes_an_operators_call(self):
        pod = get("-n", NAMESPACE, "pod", "countersign-server-0")
        inside = mesh.node_of(pod["spec"]["nodeName"])
        listening = inside.run("nsenter", "-t", self.pid_of(pod, inside), "-n", "ss", "-Hltn", stdout=sp.PIPE,
                               check=True).stdout
        ports = {int(line.split()[3].rsplit(":", 1)[1]) for line in listening.splitlines()}
        self.assertEqual(ports, {8081, 9464, 9465}, "agents, and two pages of metrics")
        with mesh.namespace("no-admin", inject=False) as ns:
            mesh.deploy(ns, mesh.deployment("caller", ["sleep", "infinity"]))
            # HTTP/2 over TLS 1.3 without a certificate, a gRPC call without a body: CountEntries is refused to
            # strangers.
            call = ["curl", "-skS", "--http2-prior-knowledge", "--tlsv1.3", "-o", "/dev/null", "-D", "-", "-X", "POST",
                    "-H", "content-type: application/grpc",
                    "-H", "te: trailers", "--data-binary", "@/tmp/empty",
                    f"https://{pod['status']['podIP']}:8081/spire.api.server.entry.v1.Entry/CountEntries"]
            mesh.run_in(ns, mesh.pod_of(ns, "caller"), "python3", "-c", "open('/tmp/empty','wb').write(bytes(5))")
            answer = mesh.run_in(ns, mesh.pod_of(ns, "caller"), *call)
            self.assertRegex(answer.lower(), r"grpc-status: (7|16)")

    def pid_of(self, pod, node):
        """A process of the pod, as the node numbers it."""
        container = pod["status"]["containerStatuses"][0]["containerID"].split("//")[1]
        tasks = node.run("ctr", "-n", "k8s.io", "task", "ls", stdout=sp.PIPE, check=True).stdout
        return next(line.split()[1] for line in tasks.splitlines() if line.startswith(container))

    def test_29_the_bundle_is_in_a_configmap_and_in_the_webhook_and_follows_every_change(self):
        show = lambda: certificates(mesh.server("bundle", "show"))
        self.assertEqual(certificates(configmap()), show())
        before = show()
        mesh.server("authority", "prepare")
        after = wait("the prepared authority in the bundle", lambda: (s := show()) != before and s, 10)
        self.assertEqual(len(after), len(before) + 1)
        wait("the ConfigMap to follow", lambda: certificates(configmap()) == after, 10)
        hooks = lambda: get("mutatingwebhookconfiguration", "countersign-injector")["webhooks"]
        in_hook = lambda hook: certificates(base64.b64decode(hook["clientConfig"]["caBundle"]).decode())
        wait("the webhook's caBundle to follow", lambda: all(in_hook(h) == after for h in hooks()), 10)
        # Somebody else's hand in it is mended too.
        kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-bundle", "-p",
                json.dumps({"data": {"bundle.crt": "garbage"}}))
        wait("the ConfigMap to be mended", lambda: certificates(configmap()) == after, 10)

    def test_30_an_agent_with_a_wrong_bundle_refuses_the_server_and_says_so(self):
        with mesh.namespace("wrong-bundle", inject=False) as ns:
            made = ("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -keyout /dev/null"
                    " -subj /CN=other -addext subjectAltName=URI:spiffe://cluster.local"
                    " -addext keyUsage=critical,keyCertSign,cRLSign 2>/dev/null")
            pem = sp.check_output(made, shell=True, text=True)
            kubectl("-n", ns, "create", "configmap", "bundle", f"--from-literal=bundle.crt={pem}")
            mesh.apply(self.agent(ns, bundle="bundle"))
            said = wait("the agent to refuse", lambda: self.said(ns, "cannot prove this node"), 30)
            self.assertRegex(said, "certificate|UnknownIssuer|not trusted|bundle")

    def test_31_a_token_of_another_service_account_attests_no_node(self):
        with mesh.namespace("stranger", inject=False) as ns:
            kubectl("-n", ns, "create", "configmap", "bundle", f"--from-literal=bundle.crt={configmap()}")
            mesh.apply(self.agent(ns, bundle="bundle"))
            said = wait("the server to refuse", lambda: self.said(ns, "cannot prove this node"), 30)
            self.assertIn("service account `stranger:default` may not attest nodes", said)

    def test_31_a_token_for_another_audience_attests_no_node(self):
        with mesh.namespace("audience", inject=False) as ns:
            kubectl("-n", ns, "create", "configmap", "bundle", f"--from-literal=bundle.crt={configmap()}")
            mesh.apply(self.agent(ns, bundle="bundle", audience="somebody-else"))
            said = wait("the server to refuse", lambda: self.said(ns, "cannot prove this node"), 30)
            self.assertIn("token is refused", said)

    def said(self, ns, words):
        lines = mesh.logs(ns, "agent", "agent", check=False).stdout or ""
        return next((line for line in lines.splitlines() if words in line), None)

    def agent(self, ns, bundle, audience="spire-server"):
        return f"""
apiVersion: v1
kind: Pod
metadata: {{name: agent, namespace: {ns}}}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {{runAsUser: 1000}}
  containers:
    - name: agent
      image: {images.COUNTERSIGN}
      imagePullPolicy: Never
      args: [agent, --trust-domain=cluster.local, "--server=countersign-server.{NAMESPACE}.svc:8081",
             --socket=/data/agent.sock, --data-dir=/data/own,
             --trust-bundle=/bundle/bundle.crt, --k8s-psat-cluster=test, --k8s-psat-token=/token/token]
      volumeMounts:
        [{{name: data, mountPath: /data}}, {{name: bundle, mountPath: /bundle}}, {{name: token, mountPath: /token}}]
  volumes:
    - {{name: data, emptyDir: {{}}}}
    - {{name: bundle, configMap: {{name: {bundle}}}}}
    - {{name: token, projected: {{sources: [{{serviceAccountToken: {{path: token, audience: {audience}}}}}]}}}}
"""
