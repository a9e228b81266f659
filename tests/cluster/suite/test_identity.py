"""Who gets which identity: registrar, agents, selectors."""
import json, re, subprocess as sp, unittest

import cluster, images, mesh
from mesh import NAMESPACE, TRUST_DOMAIN, get, kubectl, pods, run_in, wait


def proxy_log(ns, pod):
    """What a pod's container `proxy` has logged; nothing while it does not run."""
    return mesh.logs(ns, pod, "proxy", check=False).stdout or ""


def reference_pod(ns):
    """A pod in the shape of the reference's: container `proxy`, gid 1000, the agent's socket mounted. Its uid is not
    2102, which is our sidecar's and refused in a meshed namespace."""
    return f"""
apiVersion: v1
kind: ServiceAccount
metadata: {{name: web-sa}}
---
apiVersion: v1
kind: Pod
metadata:
  name: shaped
  labels: {{spiffe.io/spiffeid: "true", spire-workload: shaped, version: v1, app: shaped,
            countersign.dev/inject: disabled}}
spec:
  serviceAccountName: web-sa
  terminationGracePeriodSeconds: 1
  containers:
    - name: proxy
      image: {images.COUNTERSIGN}
      imagePullPolicy: Never
      args: [x509, watch, --socket=/agent/agent.sock]
      securityContext: {{runAsUser: 2103, runAsGroup: 1000}}
      volumeMounts: [{{name: agent, mountPath: /agent, readOnly: true}}]
    - name: idle
      image: {images.BOX}
      imagePullPolicy: Never
      args: [sleep, infinity]
  volumes: [{{name: agent, csi: {{driver: csi.countersign.dev, readOnly: true}}}}]
"""


class Identity(unittest.TestCase):
    def entry_of(self, ns, pod):
        return wait(f"the entry of {pod}", lambda: get("-n", ns, "spiffeid", pod).get("status", {}).get("entryId"), 20)

    def test_05_12_14_there_is_one_spiffeid_a_pod_with_its_entry_in_its_status(self):
        with mesh.namespace("one-each") as ns:
            kubectl("-n", ns, "create", "serviceaccount", "web-sa")
            mesh.deploy(ns, mesh.deployment("web", ["sleep", "infinity"], replicas=3, port=80, account="web-sa"))
            running = pods(ns, "app=web")
            objects = {o["metadata"]["name"]: o for o in get("-n", ns, "spiffeids")["items"]}
            self.assertEqual(sorted(objects), [p["metadata"]["name"] for p in running])
            nodes = {n["metadata"]["name"]: n["metadata"]["uid"] for n in get("nodes")["items"]}
            for pod in running:
                name, uid, node = pod["metadata"]["name"], pod["metadata"]["uid"], pod["spec"]["nodeName"]
                entry = json.loads(mesh.server("entry", "show", "--id", self.entry_of(ns, name), "--output=json"))
                entry = entry[0] if isinstance(entry, list) else entry
                self.assertEqual(entry["spiffe_id"], f"spiffe://{TRUST_DOMAIN}/ns/{ns}/sa/web-sa")
                self.assertEqual(entry["parent_id"], f"spiffe://{TRUST_DOMAIN}/spire/agent/k8s_psat/test/{nodes[node]}")
                self.assertEqual(entry["selectors"], [f"k8s:pod-uid:{uid}"])
                self.assertEqual(entry["dns_names"], [f"web.{ns}.svc"])
            mesh.delete_pods(ns, running[0]["metadata"]["name"])
            gone = running[0]["metadata"]["name"]
            wait("its object to go with the pod",
                 lambda: kubectl("-n", ns, "get", "spiffeid", gone, check=False).returncode != 0, 20)

    def test_05_system_namespaces_are_left_out(self):
        mesh.apply("apiVersion: v1\nkind: Pod\nmetadata: {name: idle, namespace: kube-public}\n"
                   "spec: {terminationGracePeriodSeconds: 1, containers: [{name: app,"
                   f" image: {images.BOX}, imagePullPolicy: Never, args: [sleep, infinity]" "}]}")
        try:
            kubectl("-n", "kube-public", "wait", "pod/idle", "--for=condition=Ready", "--timeout=60s")
            self.assertEqual(get("-n", "kube-public", "spiffeids")["items"], [])
        finally:
            mesh.delete_pods("kube-public", "idle")

    def test_15_the_agent_holds_the_svid_before_anybody_asks(self):
        with mesh.namespace("before", inject=False) as ns:
            mesh.deploy(ns, mesh.deployment("nobody-asks", ["sleep", "infinity"]))
            pod = pods(ns, "app=nobody-asks")[0]
            entry = self.entry_of(ns, pod["metadata"]["name"])
            held = lambda: [i for i in mesh.agent_status(pod["spec"]["nodeName"])["identities"]
                            if i["entry_id"] == entry]
            found = wait("the agent to hold it", lambda: held() and held()[0]["serial"] and held()[0], 10)
            self.assertEqual(found["spiffe_id"], f"spiffe://{TRUST_DOMAIN}/ns/{ns}/sa/default")

    def test_08_34_the_whole_selector_set_of_a_pod_is_logged_once_with_its_pid(self):
        with mesh.namespace("shape") as ns:
            kubectl("-n", ns, "apply", "-f", "-", input=reference_pod(ns))
            kubectl("-n", ns, "wait", "pod/shaped", "--for=condition=Ready", "--timeout=60s")
            pod = get("-n", ns, "pod", "shaped")
            uid, node = pod["metadata"]["uid"], pod["spec"]["nodeName"]
            proxy = next(c for c in pod["status"]["containerStatuses"] if c["name"] == "proxy")
            idle = next(c for c in pod["status"]["containerStatuses"] if c["name"] == "idle")
            attested = lambda: [l for l in mesh.logs(NAMESPACE, mesh.agent_on(node), "agent").splitlines()
                                if "caller attested" in l and uid in l and "in_part=false" in l]
            # What was attested before the kubelet knew the container is completed within some ten seconds.
            lines = wait("the agent's line", attested, 30)
            self.assertEqual(len(lines), 1, "one line an attestation")
            self.assertRegex(lines[0], r"pid=\d+")
            found = re.search(r'selectors="([^"]+)"', lines[0]).group(1).split()
            expected = {
                "unix:uid:2103", "unix:gid:1000", "unix:supplementary_gid:1000", "k8s:sa:web-sa", f"k8s:ns:{ns}",
                f"k8s:pod-uid:{uid}", "k8s:pod-name:shaped",
                "k8s:container-name:proxy", f"k8s:node-name:{node}", "k8s:pod-image-count:2",
                "k8s:pod-init-image-count:0",
                "k8s:pod-label:spire-workload:shaped", "k8s:pod-label:version:v1", "k8s:pod-label:app:shaped",
                "k8s:pod-label:spiffe.io/spiffeid:true", "k8s:pod-label:countersign.dev/inject:disabled",
                *(f"k8s:container-image:{i}" for i in (proxy["image"], proxy["imageID"])),
                *(f"k8s:pod-image:{i}" for c in (proxy, idle) for i in (c["image"], c["imageID"])),
            }
            self.assertEqual(set(found), expected)
            self.assertEqual(len(found), len(expected))

    def fetches(self, ns, name, pod="restartPolicy: Never"):
        """A pod that asks the agent's socket itself, and ends; what it was told."""
        text = reference_pod(ns).replace("x509, watch", "x509, fetch, --output=json")
        text = text.replace("name: shaped", f"name: {name}")
        kubectl("-n", ns, "apply", "-f", "-",
                input=text.replace("terminationGracePeriodSeconds: 1", f"terminationGracePeriodSeconds: 1\n  {pod}"))
        return json.loads(wait("its answer", lambda: "spiffe_id" in (t := proxy_log(ns, name)) and t, 40))

    def test_17_the_sidecar_is_attested_on_the_nodes_own_socket(self):
        with mesh.namespace("socket") as ns:
            mesh.deploy(ns, mesh.deployment("web", ["sleep", "infinity"]))
            pod = pods(ns, "app=web")[0]
            uid, node = pod["metadata"]["uid"], mesh.node_of(pod["spec"]["nodeName"])
            attested = lambda: [l for l in mesh.logs(NAMESPACE, mesh.agent_on(node.name), "agent").splitlines()
                                if "caller attested" in l and uid in l]
            line = wait("the agent's line", attested, 20)[0]
            # The agent's pid is the node's own number of the sidecar, and that process holds a stream on the socket's
            # path.
            caller = re.search(r"pid=(\d+)", line).group(1)
            command = node.run("cat", f"/proc/{caller}/cmdline", stdout=sp.PIPE, check=True).stdout.split("\0")
            self.assertEqual(command[:2], ["/countersign", "proxy"])
            self.assertIn("--agent-socket=/run/countersign/agent/agent.sock", command)
            cgroup = node.run("cat", f"/proc/{caller}/cgroup", stdout=sp.PIPE, check=True).stdout
            self.assertIn(uid.replace("-", "_"), cgroup.replace("-", "_"))
            streams = node.run("nsenter", "-t", caller, "-n", "ss", "-Hxpn", stdout=sp.PIPE, check=True).stdout
            self.assertIn(f"pid={caller},", streams, "an open stream of a Unix socket")
            tcp = node.run("nsenter", "-t", caller, "-n", "ss", "-Htnp", "state", "established", stdout=sp.PIPE,
                           check=True).stdout
            self.assertNotIn(f"pid={caller},", tcp, "and no other way to anybody")

    def test_a_pod_gets_its_identity_whether_its_kubelet_signs_itself_or_not(self):
        with mesh.namespace("both-kubelets") as ns:
            mesh.deploy(ns, *(mesh.deployment(f"on-{n.name}", ["sleep", "infinity"], spec=f"nodeName: {n.name}")
                              for n in cluster.NODES))
            for node in cluster.NODES:
                page = mesh.pod_page(mesh.agent_on(node.name), 9464, "/metrics")
                line = lambda name, source: f'countersign_agent_pod_source_{name}{{source="{source}"}} '
                value = lambda *which: next((int(told.removeprefix(line(*which))) for told in page.splitlines()
                                             if told.startswith(line(*which))), 0)
                self.assertEqual((value("up", "api_server"), value("up", "kubelet")), (1, int(node.verified)), page)
                served = {source: value("served_total", source) for source in ("api_server", "kubelet")}
                print(f"{node.name}: served {served}", flush=True)
                self.assertGreater(served["api_server"], 0)
                if not node.verified:
                    self.assertEqual(served["kubelet"], 0, "what cannot be verified is not asked")
                    self.assertIn("certificate", mesh.agent_status(node.name)["facts"]["pods by kubelet"])

    def granted(self, ns, wanted):
        """Which of some SpiffeID objects, made by hand by name and selectors, a pod of node1 in the reference's shape
        is granted."""
        node = get("nodes", "node1")["metadata"]["uid"]
        for name, selector in wanted.items():
            mesh.apply(json.dumps({
                "apiVersion": "spiffeid.spiffe.io/v1beta1", "kind": "SpiffeID",
                "metadata": {"name": name, "namespace": ns},
                "spec": {"spiffeId": f"spiffe://{TRUST_DOMAIN}/ns/{ns}/sa/{name}",
                         "parentId": f"spiffe://{TRUST_DOMAIN}/spire/agent/k8s_psat/test/{node}",
                         "selector": selector}}))
            self.entry_of(ns, name)
        told = self.fetches(ns, "asks", pod="nodeName: node1\n  restartPolicy: Never")
        return {i["spiffe_id"].removeprefix(f"spiffe://{TRUST_DOMAIN}/ns/{ns}/sa/") for i in told} & set(wanted)

    def test_32_a_certificate_needs_every_selector_of_its_entry(self):
        with mesh.namespace("subset") as ns:
            has = {"containerName": "proxy", "podLabel": {"app": "shaped", "version": "v1"},
                   "arbitrary": ["unix:uid:2103"]}
            lacks = {**has, "podLabel": {"app": "shaped", "version": "v2"}}
            self.assertEqual(self.granted(ns, {"all-of-them": has, "one-too-many": lacks}), {"all-of-them"})

    def test_an_object_by_hand_gives_no_more_than_its_namespaces_pods_could_have(self):
        node = get("nodes", "node1")["metadata"]["uid"]
        agent = f"spiffe://{TRUST_DOMAIN}/spire/agent/k8s_psat/test/{node}"
        with mesh.namespace("by-hand-ids", inject=False) as ns:
            own = f"spiffe://{TRUST_DOMAIN}/ns/{ns}/sa/default"
            cases = {
                "anothers-id": ({"spiffeId": f"spiffe://{TRUST_DOMAIN}/ns/kube-system/sa/default", "parentId": agent},
                                "could have"),
                "the-webhook": ({"spiffeId": own, "parentId": agent,
                                 "dnsNames": [f"countersign-injector.{NAMESPACE}.svc"]}, "is no name of a Service"),
                "the-api-server": ({"spiffeId": own, "parentId": agent, "dnsNames": ["kubernetes.default.svc"]},
                                   "is no name of a Service"),
                "a-free-parent": ({"spiffeId": own, "parentId": f"spiffe://{TRUST_DOMAIN}/spire/server"}, "parentId"),
            }
            for name, (spec, said) in cases.items():
                mesh.apply(json.dumps({"apiVersion": "spiffeid.spiffe.io/v1beta1", "kind": "SpiffeID",
                                       "metadata": {"name": name, "namespace": ns},
                                       "spec": {**spec, "selector": {"namespace": ns}}}))
                condition = wait(f"the status of {name}",
                                 lambda: get("-n", ns, "spiffeid", name).get("status", {}).get("conditions"), 20)[0]
                self.assertEqual((condition["status"], condition["reason"]), ("False", "Refused"))
                self.assertIn(said, condition["message"])
            self.assertNotIn(own, mesh.server("entry", "show", "--output=json"))

    @mesh.alone
    def test_labels_of_a_namespace_are_attested_where_they_are_asked_for(self):
        mesh.install("agent.namespaceLabels=true")
        try:
            with mesh.namespace("labelled") as ns:
                kubectl("label", "namespace", ns, "team=blue")
                team = lambda name: {"containerName": "proxy", "arbitrary": [f"k8s:ns-label:team:{name}"]}
                self.assertEqual(self.granted(ns, {"blue": team("blue"), "red": team("red")}), {"blue"})
        finally:
            mesh.install()

    def test_33_two_pods_of_one_service_account_have_svids_of_their_own(self):
        with mesh.namespace("twins") as ns:
            mesh.deploy(ns, mesh.deployment("twin", ["sleep", "infinity"], replicas=2))
            entries = {self.entry_of(ns, p["metadata"]["name"]) for p in pods(ns, "app=twin")}
            identities = [i for n in cluster.NODES for i in mesh.agent_status(n.name)["identities"]
                          if i["entry_id"] in entries]
            self.assertEqual(len(identities), 2)
            self.assertEqual(len({i["spiffe_id"] for i in identities}), 1)
            self.assertEqual(len({i["serial"] for i in identities}), 2)
            # Asked for by two pods themselves: the same identity, other keys.
            first, second = (
                sp.run(["openssl", "x509", "-noout", "-pubkey"], input=self.fetches(ns, name)[0]["certificates"],
                       text=True, stdout=sp.PIPE, check=True).stdout for name in ("first", "second"))
            self.assertIn("BEGIN PUBLIC KEY", first)
            self.assertNotEqual(first, second)

    def test_a_pods_token_is_good_for_its_audience_and_in_another_pod_of_another_node(self):
        with mesh.namespace("tokens") as ns:
            mesh.deploy(ns, *(mesh.deployment(n.name, ["sleep", "infinity"], spec=f"nodeName: {n.name}")
                              for n in cluster.NODES))
            first, second = (mesh.pod_of(ns, n.name) for n in cluster.NODES)
            jwt = lambda pod, *command, check=True: run_in(
                ns, pod, "/countersign", "jwt", *command, "--socket=/run/countersign/agent/agent.sock",
                "--output=json", container="countersign-proxy", check=check)
            (token,) = [svid["token"] for svid in json.loads(jwt(first, "fetch", "--audience=shop"))]
            good = json.loads(jwt(second, "validate", "--audience=shop", f"--svid={token}"))
            self.assertEqual(good["spiffe_id"], f"spiffe://{TRUST_DOMAIN}/ns/{ns}/sa/default")
            for audience, svid in (("bank", token), ("shop", token[:-4] + "AAAA")):
                refused = jwt(second, "validate", f"--audience={audience}", f"--svid={svid}", check=False)
                self.assertNotEqual(refused.returncode, 0, refused.stdout)
            others = jwt(first, "fetch", "--audience=shop", f"--spiffe-id=spiffe://{TRUST_DOMAIN}/ns/shop/sa/default",
                         check=False)
            self.assertNotEqual(others.returncode, 0, others.stdout)

    def test_another_container_of_the_node_gets_its_own_identity_or_none(self):
        with mesh.namespace("own-only") as ns:
            ids = {i["spiffe_id"] for i in self.fetches(ns, "fetches")}
            self.assertEqual(ids, {f"spiffe://{TRUST_DOMAIN}/ns/{ns}/sa/web-sa"}, "its own, and no other of the node")
        # In a namespace that is left out there is no entry, and so no identity.
        text = reference_pod("kube-public").replace("x509, watch", "x509, fetch")
        text = text.replace("name: shaped", "name: nobody")
        try:
            kubectl("-n", "kube-public", "apply", "-f", "-", input=text)
            log = ("kube-public", "nobody")
            refusal = wait("the refusal", lambda: "no identity issued" in (t := proxy_log(*log)) and t, 60)
            self.assertIn("also needs k8s:pod-uid:", refusal, "and the closest miss is named")
        finally:
            kubectl("-n", "kube-public", "delete", "pod/nobody", "sa/web-sa", "--ignore-not-found")

    def test_a_deleted_pods_pid_that_another_process_gets_is_attested_anew(self):
        with mesh.namespace("reused") as ns:
            # A pod that holds a stream, and the pid that the agent knew it by.
            mesh.deploy(ns, mesh.deployment("first", ["sleep", "infinity"], spec="nodeName: node1"))
            pod, node = pods(ns, "app=first")[0], mesh.node_of("node1")
            uid = pod["metadata"]["uid"]
            attested = lambda what: [l for l in mesh.logs(NAMESPACE, mesh.agent_on("node1"), "agent").splitlines()
                                     if "caller attested" in l and what in l]
            pid = int(re.search(r"pid=(\d+)", wait("the agent's line", lambda: attested(uid), 20)[-1]).group(1))
            kubectl("-n", ns, "delete", "deployment", "first")
            kubectl("-n", ns, "wait", "--for=delete", f"pod/{pod['metadata']['name']}", "--timeout=60s")
            # A process outside of every pod takes that very pid (the kernel counts up from ns_last_pid) and asks the
            # socket.
            binary = str(mesh.binary())
            script = f"""
import os, subprocess as sp, sys
for _ in range(200):
    open("/proc/sys/kernel/ns_last_pid", "w").write(str({pid} - 1))
    child = sp.Popen([{binary!r}, "x509", "fetch", "--socket=/run/countersign/agent/agent.sock"],
                     stdout=sp.PIPE, stderr=sp.STDOUT, text=True)
    said = child.communicate()[0]
    if child.pid == {pid}: print(said); sys.exit(0)
sys.exit("the pid was not to be had")
"""
            said = node.run("/usr/bin/python3", "-c", script, stdout=sp.PIPE, stderr=sp.STDOUT).stdout
            self.assertIn("no identity issued", said)
            self.assertNotIn(f"/ns/{ns}/", said, "nothing of the pod that had the number before")

    def test_a_statefulsets_pod_made_again_never_gets_its_predecessors_svid(self):
        with mesh.namespace("again") as ns:
            stateful = mesh.deployment("db", ["sleep", "infinity"]).replace("kind: Deployment", "kind: StatefulSet")
            mesh.deploy(ns, stateful.replace("spec:\n  replicas", "spec:\n  serviceName: db\n  replicas"))
            first_uid = get("-n", ns, "pod", "db-0")["metadata"]["uid"]
            first = self.entry_of(ns, "db-0")
            mesh.delete_pods(ns, "db-0")
            kubectl("-n", ns, "rollout", "status", "statefulset/db", "--timeout=60s")
            pod = get("-n", ns, "pod", "db-0")
            self.assertNotEqual(pod["metadata"]["uid"], first_uid)
            second = wait("a new entry", lambda: (e := self.entry_of(ns, "db-0")) != first and e, 20)
            entry = json.loads(mesh.server("entry", "show", "--id", second, "--output=json"))
            entry = entry[0] if isinstance(entry, list) else entry
            self.assertEqual(entry["selectors"], [f"k8s:pod-uid:{pod['metadata']['uid']}"])
            for node in cluster.NODES:
                wait("the old one to be gone from the agents",
                     lambda: first not in [i["entry_id"] for i in mesh.agent_status(node.name)["identities"]], 10)
