"""What is broken is named: `check` says what and how to mend it, and `explain` of an affected pod says it too."""
import base64, contextlib, json, re, subprocess as sp, time, unittest

import cluster, mesh
from mesh import NAMESPACE, deploy, deployment, get, kubectl, pod_of, pods, wait
from suite.test_csi import DRIVER
from suite.test_limits import QUOTA
from suite.test_operator import countersign, user
from suite.test_repair import WEBHOOK, all_is_well, found

DEBUG = ("Status {", "ErrorResponse", "Some(", "ApiError")


def explain(what, ns, *flags):
    """What `explain` tells of KIND/NAME; its table beside it must be lines of words."""
    done = countersign("explain", what, "-n", ns, "--output", "json", *flags)
    if not done.stdout:
        raise AssertionError(done.stderr)
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["ok"] else 1), done
    told["step"] = {s["step"]: s for s in told["steps"]}
    told["cause"] = {c["check"]: c for c in told["causes"]}
    return told


def bare(name, **labels):
    """A pod that sleeps."""
    app = {"name": "app", "image": mesh.images.BOX, "imagePullPolicy": "Never", "args": ["sleep", "infinity"]}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels},
                       "spec": {"terminationGracePeriodSeconds": 1, "securityContext": {"runAsUser": 1000},
                                "containers": [app]}})


@contextlib.contextmanager
def scaled(what, replicas):
    kubectl("-n", NAMESPACE, "scale", what, "--replicas=0")
    try:
        yield
    finally:
        kubectl("-n", NAMESPACE, "scale", what, f"--replicas={replicas}")
        mesh.ready()


@contextlib.contextmanager
def without(*what):
    """Some objects of the installation are gone."""
    kubectl("delete", *what)
    try:
        yield
    finally:
        mesh.apply(mesh.manifests())
        mesh.ready()


@contextlib.contextmanager
def no_agent_on(node):
    """A node that has no agent."""
    kubectl("label", "node", node, "test/no-agent=true")
    terms = [{"matchExpressions": [{"key": "test/no-agent", "operator": "DoesNotExist"}]}]
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    kubectl("-n", NAMESPACE, "patch", "daemonset", "countersign-agent", "--type=strategic", "-p",
            json.dumps({"spec": {"template": {"spec": {"affinity": affinity}}}}))
    try:
        yield
    finally:
        kubectl("label", "node", node, "test/no-agent-")
        mesh.install()


class Check(unittest.TestCase):
    def failed(self, check, *words, seconds=60):
        """Waits until `check` finds fault with this and says these words."""
        bad = lambda: not (c := found()[check])["ok"] and all(w in c["found"] for w in words) and c
        last = wait(f"a finding of {check} with {words}", bad, seconds)
        self.assertTrue(last["mend"])
        for word in DEBUG:
            self.assertNotIn(word, last["found"])
        return last

    def caused(self, what, ns, check, *words, seconds=60):
        """Waits until `explain` names this finding as a cause."""
        last = {}
        def look():
            last.update(explain(what, ns))
            cause = last["cause"].get(check, {})
            return all(w in cause.get("found", "") for w in words) and cause
        try:
            cause = wait(f"{check} as a cause", look, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {last}") from None
        self.assertTrue(cause["mend"])
        self.assertFalse(last["ok"])
        table = countersign("explain", what, "-n", ns).stdout
        self.assertIn(check, table)
        for word in DEBUG:
            self.assertNotIn(word, table)
        return last

    def test_a_mesh_that_is_well_is_green_and_says_what_was_looked_at(self):
        all_is_well()
        last = found()
        self.assertIn("countersign-agent has all 3, countersign-server has all", last["RBAC"]["found"])
        self.assertEqual(last["agent's socket"]["found"], "answered by the agent on 2 nodes")
        self.assertEqual(last["admission policies"]["found"], "8 policies and bindings as in the chart")
        self.assertIn("as in the chart", last["webhook's rules"]["found"])
        self.assertEqual(last["CSI driver"]["found"], f"{DRIVER} serves 2 nodes")
        # Who may not ask for reviews is told that nothing was checked, and nobody is told that it is fine.
        with user("looker", "get,list pods,nodes,namespaces,services,configmaps",
                  "get daemonsets.apps,statefulsets.apps,deployments.apps") as as_looker:
            look = lambda: json.loads(as_looker("check", "--output", "json").stdout or "{}").get("checks")
            row = lambda: {c["check"]: c for c in look() or []}.get("RBAC")
            last = wait("a finding", lambda: (c := row()) and not c["checked"] and c, 20)
            self.assertEqual((last["ok"], last["checked"]), (False, False))
            self.assertIn("subjectaccessreviews", last["mend"])
            self.assertIn("not checked", as_looker("check").stdout)

    def test_a_deleted_binding_and_an_edited_role_are_named_with_what_lacks(self):
        with mesh.namespace("no-binding") as ns:
            deploy(ns, deployment("app", ["sleep", "infinity"]))
            with without("clusterrolebinding/countersign-server"):
                last = self.failed("RBAC", "there is no ClusterRoleBinding countersign-server",
                                   "service account countersign-server may not", "delete spiffeids.spiffeid.spiffe.io")
                self.assertIn("countersign install", last["mend"])
                self.assertIn("ClusterRoleBinding countersign-server", last["mend"])
                # The registrar starts anew, so that no watch lives on that was allowed when it began.
                mesh.delete_pods(NAMESPACE, "countersign-server-0")
                kubectl("-n", ns, "apply", "-f", "-", input=bare("late"))
                self.caused("pod/late", ns, "RBAC", "there is no ClusterRoleBinding countersign-server")
        with without("clusterrolebinding/countersign-agent"):
            self.failed("RBAC", "service account countersign-agent may not get nodes/pods; list, watch pods")
        rules = get("clusterrole", "countersign-agent")["rules"]
        kubectl("patch", "clusterrole", "countersign-agent", "--type=json", "-p",
                json.dumps([{"op": "replace", "path": "/rules", "value": rules[1:]}]))
        try:
            self.failed("RBAC", "ClusterRole countersign-agent lacks a rule", "may not list, watch pods")
        finally:
            mesh.apply(mesh.manifests())
        all_is_well()

    def test_a_server_that_is_down_is_named(self):
        with mesh.namespace("no-server") as ns:
            with scaled("statefulset/countersign-server", 1):
                last = self.failed("server", "0 of 0 servers ready: it is scaled to 0")
                self.assertIn("scale", last["mend"])
                kubectl("-n", ns, "apply", "-f", "-", input=bare("late"))
                told = self.caused("pod/late", ns, "server", "scaled to 0")
                self.assertIn("no SpiffeID object", told["step"]["registration"]["found"])
                self.assertFalse(told["step"]["pod"]["ok"])
        all_is_well()

    def test_a_wrong_ca_bundle_is_named_and_so_is_the_pod_that_was_refused(self):
        with mesh.namespace("wrong-bundle") as ns, scaled("statefulset/countersign-server", 1):
            wait("the server to end", lambda: not mesh.pods(NAMESPACE, "app.kubernetes.io/component=server"))
            # Somebody else's certificate; the server, which would write its own, is away.
            wrong = base64.b64encode((cluster.STATE / "pki" / "ca.crt").read_bytes()).decode()
            hooks = get(*WEBHOOK)["webhooks"]
            kubectl("patch", *WEBHOOK, "--type=json", "-p", json.dumps(
                [{"op": "replace", "path": f"/webhooks/{n}/clientConfig/caBundle", "value": wrong}
                 for n in range(len(hooks))]))
            self.failed("webhook's caBundle", f"0 of {len(hooks)} webhooks have the bundle of the ConfigMap")
            self.failed("webhook", "gets no answer from the injectors", "x509", seconds=120)
            kubectl("-n", ns, "apply", "-f", "-", input=deployment("app", ["sleep", "infinity"]))
            told = self.caused("deployment/app", ns, "webhook's caBundle", "0 of")
            self.assertIn("none was made", told["step"]["pods"]["found"])
            wait("the event", lambda: any("x509" in e["message"] for e in explain("deployment/app", ns)["events"]), 30)
            # A pod's name that was never given leads to what should have made it.
            told = self.caused("pod/app", ns, "webhook's caBundle", "0 of")
            self.assertIn("there is no pod wrong-bundle/app; ReplicaSet app-", told["step"]["pod"]["found"])
        all_is_well()

    def test_an_agent_that_is_down_on_one_node_is_named_for_the_pods_of_that_node(self):
        with mesh.namespace("no-agent") as ns:
            spec = "nodeName: {}"
            deploy(ns, deployment("one", ["sleep", "infinity"], spec=spec.format("node1")))
            with no_agent_on("node2"):
                last = self.failed("agents", "no agent is ready on node2 (it has no pod of the agent)")
                self.assertIn("agent", last["mend"])
                kubectl("-n", ns, "apply", "-f", "-",
                        input=deployment("two", ["sleep", "infinity"], spec=spec.format("node2")))
                wait("its pod", lambda: pods(ns, "app=two"), 20)
                told = self.caused(f"pod/{pod_of(ns, 'two')}", ns, "agents", "node2")
                self.assertEqual(told["step"]["agent"]["found"], "there is none on node node2")
                self.assertIn("countersign-proxy", told["step"]["pod"]["found"])
                # The other node's agent is replaced meanwhile, for the set has changed.
                wait("the other node's pod to be well", lambda: explain(f"pod/{pod_of(ns, 'one')}", ns)["ok"], 60)
        all_is_well()

    def test_a_kubelet_that_signs_itself_without_the_watch_is_named(self):
        with mesh.namespace("no-source") as ns:
            deploy(ns, deployment("one", ["sleep", "infinity"], spec="nodeName: node1"))
            mesh.apply(mesh.manifests("agent.watchPods=false"))
            try:
                last = self.failed("pod source", "on node2 no source of pods works", seconds=120)
                self.assertIn("agent.watchPods=true", last["mend"])
                self.failed("agents", "no agent is ready on", "node2 (")
                self.assertTrue(found()["RBAC"]["ok"], "the agent needs no watch now")
                kubectl("-n", ns, "apply", "-f", "-",
                        input=deployment("two", ["sleep", "infinity"], spec="nodeName: node2"))
                wait("its pod", lambda: pods(ns, "app=two"), 20)
                told = self.caused(f"pod/{pod_of(ns, 'two')}", ns, "pod source", "node2")
                self.assertIn("is not ready", told["step"]["agent"]["found"])
            finally:
                mesh.install()
        all_is_well()

    def test_a_label_that_means_nothing_is_named_by_key_and_by_value(self):
        with mesh.namespace("mislabelled", inject=False) as ns:
            kubectl("label", "namespace", ns, "countersign.dev/inejct=enabled")
            deploy(ns, deployment("app", ["sleep", "infinity"]))
            self.failed("labels", "namespace mislabelled: nobody reads countersign.dev/inejct; did you mean"
                                  " `countersign.dev/inject`?")
            told = explain(f"pod/{pod_of(ns, 'app')}", ns)
            self.assertIn("did you mean `countersign.dev/inject`?", told["step"]["injection"]["found"])
            kubectl("label", "namespace", ns, "countersign.dev/inejct-")
            # A value gets there only while neither the webhook nor the policy judges it.
            binding = "validatingadmissionpolicybinding/countersign-words"
            with without("/".join(WEBHOOK), binding):
                self.failed("admission policies", "there is no ValidatingAdmissionPolicyBinding countersign-words")
                put = lambda: kubectl("label", "namespace", ns, "countersign.dev/inject=enable", check=False)
                wait("the label to be taken", lambda: put().returncode == 0, 30)
            self.failed("labels", "namespace mislabelled: countersign.dev/inject is `enable`")
            told = explain(f"pod/{pod_of(ns, 'app')}", ns)
            self.assertIn("its namespace's label countersign.dev/inject is `enable`, neither enabled nor disabled;"
                          " did you mean `enabled`?", told["step"]["injection"]["found"])
            # New pods are refused there, which their owner's events say.
            kubectl("-n", ns, "apply", "-f", "-", input=deployment("next", ["sleep", "infinity"]))
            told = lambda: [e["message"] for e in explain("deployment/next", ns)["events"]]
            wait("the refusal", lambda: any("enable" in message for message in told()), 60)
        all_is_well()

    def test_an_edited_policy_and_an_edited_webhook_are_named_where_they_differ(self):
        policy = "validatingadmissionpolicy/countersign-pods"
        try:
            kubectl("patch", policy, "--type=merge", "-p", '{"spec":{"failurePolicy":"Ignore"}}')
            kubectl("patch", *WEBHOOK, "--type=json", "-p",
                    '[{"op":"replace","path":"/webhooks/0/failurePolicy","value":"Ignore"}]')
            self.failed("admission policies", "countersign-pods differs from the chart's at spec.failurePolicy")
            self.failed("webhook's rules", "differs from the chart's at webhooks[0].failurePolicy")
        finally:
            mesh.apply(mesh.manifests())
        all_is_well()

    def test_a_quota_that_refuses_pods_is_named_by_the_owners_events(self):
        with mesh.namespace("full-quota") as ns:
            kubectl("-n", ns, "apply", "-f", "-", input=QUOTA)
            kubectl("-n", ns, "apply", "-f", "-", input=deployment("app", ["sleep", "infinity"]))
            self.failed("limits", "namespace full-quota, deployment app: ResourceQuota team refuses")
            told = wait("the event", lambda: (t := explain("deployment/app", ns))["events"] and t, 30)
            self.assertIn("0 of 1 pods ready", told["step"]["deployment"]["found"])
            self.assertIn("ReplicaFailure", wait("the condition", lambda: "ReplicaFailure" in (
                f := explain("deployment/app", ns)["step"]["deployment"]["found"]) and f, 30))
            event = told["events"][0]
            self.assertEqual(event["reason"], "FailedCreate")
            self.assertIn("must specify limits.cpu", event["message"])
            self.assertIn("cpu-limit", told["cause"]["limits"]["mend"])
            name = get("-n", ns, "replicasets")["items"][0]["metadata"]["name"]
            told = explain(f"pod/{name}-abcde", ns)
            self.assertIn(f"ReplicaSet {name} makes pods of such a name", told["step"]["pod"]["found"])
            self.assertEqual(told["events"][0]["reason"], "FailedCreate")
            missing = countersign("explain", "pod", "nobody", "-n", ns)
            self.assertEqual(missing.returncode, 1)
            self.assertIn("there is no pod full-quota/nobody", missing.stderr)

    def test_an_app_that_crashes_is_told_of_with_its_exit_code_and_its_last_warning(self):
        with mesh.namespace("crashing") as ns:
            kubectl("-n", ns, "apply", "-f", "-", input=deployment("app", ["bash", "-c", "exit 7"]))
            wait("its pod", lambda: pods(ns, "app=app"), 20)
            pod = f"pod/{pod_of(ns, 'app')}"
            crashed = lambda: "exit code 7 (Error)" in (t := explain(pod, ns))["step"]["pod"]["found"] and t
            told = wait("the crash", crashed, 60)
            self.assertFalse(told["ok"])
            self.assertTrue(told["step"]["SVID"]["ok"], "its sidecar is well")
            wait("the warning", lambda: "BackOff" in [e["reason"] for e in explain(pod, ns)["events"]], 60)

    def test_an_object_that_somebody_made_by_hand_is_listed_and_a_refused_one_is_a_finding(self):
        with mesh.namespace("by-hand") as ns:
            made = lambda name, path: json.dumps({
                "apiVersion": "spiffeid.spiffe.io/v1beta1", "kind": "SpiffeID", "metadata": {"name": name},
                "spec": {"spiffeId": f"spiffe://{mesh.TRUST_DOMAIN}/{path}", "parentId": self.parent(),
                         "selector": {"podName": "x"}}})
            kubectl("-n", ns, "apply", "-f", "-", input=made("good", f"ns/{ns}/sa/extra"))
            listed = lambda: (c := found()["SpiffeIDs"])["ok"] and "by-hand/good" in c["found"]
            wait("the object", listed, 20)
            kubectl("-n", ns, "apply", "-f", "-", input=made("bad", "ns/kube-system/sa/default"))
            self.failed("SpiffeIDs", "1 not registered: by-hand/bad, made by hand, for spiffe://")
        all_is_well()

    def parent(self):
        return next(s["spec"]["parentId"] for s in get("-A", "spiffeids")["items"])

    def test_a_socket_of_somebody_else_on_a_node_is_named(self):
        node = cluster.NODES[1]
        agent = mesh.agent_on(node.name)
        path = "/run/countersign/agent/agent.sock"
        # Another process has the path, and the agent cannot have it back while that one listens.
        serve = ("import socket, os, sys; s = socket.socket(socket.AF_UNIX);"
                 f"s.bind('{path}.other'); s.listen(); os.rename('{path}.other', '{path}'); sys.stdin.read()")
        init = (node.dir / "init").read_text()
        other = sp.Popen(["nsenter", "-t", init, "-n", "-m", "-p", "--", "python3", "-c", serve],
                         stdin=sp.PIPE)
        try:
            last = self.failed("agent's socket", "not answered by the agent on node2", "which is not this agent")
            self.assertIn("end the process", last["mend"])
        finally:
            other.stdin.close()
            other.wait()
        wait("the agent to have its socket again", lambda: found()["agent's socket"]["ok"], 30)
        self.assertEqual(mesh.agent_on(node.name), agent)
        all_is_well()

    def test_a_csi_driver_that_is_down_is_named_and_hostpath_is_not(self):
        names = []
        try:
            with mesh.namespace("no-driver") as ns:
                names.append(ns)
                kubectl("label", "namespace", ns, "pod-security.kubernetes.io/enforce=baseline")
                self.assertNotIn("hostPath", self.failed("pod security", "no-driver (baseline)")["found"])
                kubectl("label", "namespace", ns, "pod-security.kubernetes.io/enforce-")
                # Another folder than the kubelet's: the driver runs, and the kubelet does not know it.
                mesh.apply(mesh.manifests("agent.csi.kubeletDir=/var/lib/elsewhere"))
                said = self.failed("CSI driver", "the CSI driver is not ready on", "the kubelet has not registered",
                                   seconds=120)
                self.assertTrue(said["mend"])
                # The roll-out stops at the first node.
                node = re.search(r"not ready on (node\d) \(", said["found"])[1]
                kubectl("-n", ns, "apply", "-f", "-",
                        input=deployment("app", ["sleep", "infinity"], spec=f"nodeName: {node}"))
                wait("its pod", lambda: pods(ns, "app=app"), 20)
                pod = f"pod/{pod_of(ns, 'app')}"
                self.caused(pod, ns, "CSI driver", f"not ready on {node}")
                wait("the event", lambda: "FailedMount" in [e["reason"] for e in explain(pod, ns)["events"]], 90)
                mesh.install()
                kubectl("delete", "csidriver", DRIVER)
                self.failed("CSI driver", f"there is no CSIDriver {DRIVER}")
        finally:
            mesh.install()
            # Its pod ends only with the driver.
            kubectl("delete", "namespace", "--ignore-not-found", *names, "--timeout=180s", timeout=200)
        all_is_well()

    def test_what_driver_and_agents_need_is_looked_at_before_an_installation(self):
        last = found("--before")
        self.assertEqual(last["CSI driver"]["found"], "the CSI driver needs Linux 5.12, which 2 nodes have")
        self.assertEqual(last["agents' pods"]["found"], f"namespace {NAMESPACE} admits them")
        self.assertIn("is not there yet", found("--before", "-n", "nowhere")["agents' pods"]["found"])
        without = found("--before", "--set", "agent.csi.enabled=false")["CSI driver"]
        self.assertEqual((without["ok"], "root on a node" in without["found"]), (True, True))
        with mesh.namespace("leveled-mesh", inject=False) as ns:
            kubectl("label", "namespace", ns, "pod-security.kubernetes.io/enforce=baseline")
            refused = found("--before", "-n", ns)["agents' pods"]
            self.assertFalse(refused["ok"])
            self.assertIn("violates PodSecurity", refused["found"])
            self.assertIn("enforce=privileged", refused["mend"])

    def test_a_check_takes_seconds(self):
        began = time.monotonic()
        found()
        self.assertLess(time.monotonic() - began, 15)
