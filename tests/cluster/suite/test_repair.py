"""What belongs to the installation and is deleted, emptied or edited: it comes back, or `check` names it."""
import base64, json, time, unittest

import mesh
from mesh import NAMESPACE, deploy, deployment, get, kubectl, pod_of, pods, run_in, wait, web
from suite.test_bootstrap import certificates
from suite.test_operator import countersign
from suite.test_traffic import Load

BUNDLE = ("-n", NAMESPACE, "configmap", "countersign-bundle")
WEBHOOK = ("mutatingwebhookconfiguration", "countersign-injector")
SERVER = f"system:serviceaccount:{NAMESPACE}:countersign-server"
DEFINITION = "spiffeids.spiffeid.spiffe.io"
ASK = ("curl", "-sSf", "-m", "5", "http://fresh:8080/")


def found(*flags):
    """The findings of `check`, by name."""
    return {c["check"]: c for c in json.loads(countersign("check", "--output", "json", *flags).stdout)["checks"]}


def all_is_well(seconds=60):
    """Waits until `check` finds nothing wrong."""
    bad = []
    def look():
        bad[:] = [c for c in found().values() if not c["ok"]]
        return not bad
    try:
        wait("a green check", look, seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}: {bad}") from None


def bundle():
    """What is published; nothing where that is missing."""
    done = kubectl("get", *BUNDLE, "-o", "json", check=False)
    data = json.loads(done.stdout).get("data") or {} if done.returncode == 0 else {}
    return certificates(data.get("bundle.crt", ""))


def root():
    return certificates(mesh.server("bundle", "show"))


def patch(*what, **change):
    kubectl("patch", *what, "--type=merge", "-p", json.dumps(change))


def restart_agents():
    mesh.delete_pods(NAMESPACE, "-l", "app.kubernetes.io/component=agent")
    mesh.ready()


class Repair(unittest.TestCase):
    def failed(self, check, *words):
        """Waits until `check` finds fault with this and says these words."""
        last = wait(f"a finding of {check}", lambda: not (c := found()[check])["ok"] and c, 20)
        for word in words:
            self.assertIn(word, last["found"])
        self.assertTrue(last["mend"])
        return last

    def a_new_pod_works(self, ns, seconds=30):
        """A pod that begins now is reached by one that was there before."""
        deploy(ns, web("fresh"), timeout=max(seconds, 90))
        ask = lambda: run_in(ns, pod_of(ns, "client"), *ASK, check=False).stdout == "ok"
        wait("a new pod to be reached", ask, seconds)

    def test_the_bundle_comes_back_whatever_is_done_to_it_and_agents_that_restart_have_it(self):
        whole, before = root(), get(*BUNDLE)["metadata"]
        self.assertEqual(before["labels"]["app.kubernetes.io/name"], "countersign")
        # The name bounds `create` as well, for the API server knows it from the path of an apply request.
        may = lambda *what: kubectl("-n", NAMESPACE, "auth", "can-i", *what, f"--as={SERVER}", check=False).stdout
        for what in ("configmaps", "configmaps/other"):
            self.assertEqual(may("create", what).strip(), "no")
        hurts = {"deleted": lambda: kubectl("delete", *BUNDLE),
                 "edited": lambda: patch(*BUNDLE, data={"bundle.crt": "x"}),
                 "emptied": lambda: patch(*BUNDLE, data=None),
                 "blank": lambda: patch(*BUNDLE, data={"bundle.crt": ""}),
                 "deleted again": lambda: kubectl("delete", *BUNDLE)}
        with mesh.namespace("bundle-gone") as ns:
            deploy(ns, deployment("client", ["sleep", "infinity"]))
            for how, hurt in hurts.items():
                wait("the bundle", lambda: bundle() == whole, 5)
                hurt()
                began = time.monotonic()
                wait(f"the bundle that was {how}", lambda: bundle() == whole, 20)
                print(f"{how}: back after {time.monotonic() - began:.1f} s", flush=True)
            metadata = lambda: get(*BUNDLE, "--show-managed-fields")["metadata"]
            now = wait("its labels", lambda: (m := metadata()).get("labels") and m, 5)
            self.assertEqual(now["labels"], before["labels"])
            owned = next(f["fieldsV1"] for f in now["managedFields"]
                         if (f["manager"], f["operation"]) == ("countersign-server", "Apply"))
            self.assertEqual(owned, {"f:data": {"f:bundle.crt": {}}})
            kubectl("delete", *BUNDLE)
            restart_agents()
            self.a_new_pod_works(ns)
        all_is_well()

    def test_what_was_deleted_while_the_server_was_away_is_named_and_comes_back_with_it(self):
        whole = root()
        kubectl("-n", NAMESPACE, "scale", "statefulset/countersign-server", "--replicas=0")
        try:
            component = ("-l", "app.kubernetes.io/component=server")
            wait("the server to end", lambda: not get("-n", NAMESPACE, "pods", *component)["items"])
            kubectl("delete", *BUNDLE)
            hooks = get(*WEBHOOK)["webhooks"]
            for n in range(len(hooks)):
                kubectl("patch", *WEBHOOK, "--type=json", "-p",
                        json.dumps([{"op": "remove", "path": f"/webhooks/{n}/clientConfig/caBundle"}]))
            last = self.failed("bundle", "does not exist, so no agent can start")
            self.assertIn("countersign install", last["mend"])
            # Two that are empty are no agreement.
            self.failed("webhook's caBundle", f"{len(hooks)} of {len(hooks)} webhooks have no caBundle")
        finally:
            kubectl("-n", NAMESPACE, "scale", "statefulset/countersign-server", "--replicas=1")
        mesh.ready()
        # An authority that has ended meanwhile is not in it any more.
        wait("the bundle", lambda: (now := bundle()) == root() and set(now) & set(whole), 20)
        labels = lambda: get(*BUNDLE)["metadata"].get("labels", {}).get("app.kubernetes.io/name")
        self.assertEqual(wait("its labels", labels, 5), "countersign")
        all_is_well()

    def test_without_the_settings_pods_start_the_mesh_is_strict_and_check_says_so(self):
        with mesh.namespace("no-settings") as ns, mesh.namespace("bare-settings", inject=False) as bare:
            deploy(ns, web(), deployment("client", ["sleep", "infinity"]))
            deploy(bare, deployment("stranger", ["sleep", "infinity"]))
            # Emptied and deleted are the same.
            patch("-n", NAMESPACE, "configmap", "countersign-mesh", data=None)
            self.failed("settings", "names no mode, so the mesh is strict")
            kubectl("-n", NAMESPACE, "delete", "configmap", "countersign-mesh")
            try:
                last = self.failed("settings", "no ConfigMap countersign-mesh, so the mesh is strict")
                self.assertIn("countersign install", last["mend"])
                mesh.delete_pods(NAMESPACE, "countersign-server-0")
                restart_agents()
                self.a_new_pod_works(ns)
                refused = run_in(bare, pod_of(bare, "stranger"), "curl", "-sS", "-m", "5", f"http://fresh.{ns}:8080/",
                                 check=False)
                self.assertNotEqual(refused.returncode, 0, "strict")
            finally:
                mesh.apply(mesh.manifests())
        all_is_well()

    def test_a_webhook_that_was_deleted_is_named_and_pods_without_it_are_refused(self):
        in_hooks = lambda: [certificates(base64.b64decode(h["clientConfig"].get("caBundle", "")).decode())
                            for h in get(*WEBHOOK)["webhooks"]]
        whole = in_hooks()
        kubectl("patch", *WEBHOOK, "--type=json", "-p", json.dumps(
            [{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"},
             {"op": "replace", "path": "/webhooks/1/clientConfig/caBundle", "value": ""}]))
        wait("the caBundles", lambda: in_hooks() == whole, 5)
        with mesh.namespace("no-webhook") as ns:
            deploy(ns, web(), deployment("client", ["sleep", "infinity"]))
            kubectl("delete", *WEBHOOK)
            try:
                last = self.failed("webhook's caBundle", "no webhook configuration", "new pods get no sidecar")
                self.assertIn("countersign install", last["mend"])
                self.failed("webhook", "is not injected")
                deploy(ns, deployment("bare", ["sleep", "infinity"]))
                self.assertNotIn("initContainers", pods(ns, "app=bare")[0]["spec"])
                refused = run_in(ns, pod_of(ns, "bare"), "curl", "-sS", "-m", "5", "http://web:8080/", check=False)
                self.assertNotEqual(refused.returncode, 0, "strict refuses whoever has no sidecar")
                said = lambda: "so new pods get no sidecar" in mesh.logs(NAMESPACE, "countersign-server-0", "server")
                wait("the server to say so", said, 10)
            finally:
                mesh.apply(mesh.manifests())
            wait("the caBundles", lambda: in_hooks() == whole, 10)
            self.a_new_pod_works(ns)
        all_is_well()

    def test_without_the_resource_known_pods_keep_their_identities_and_it_is_taken_up_again(self):
        entries = lambda ns: sorted(s["status"]["entryId"] for s in get("-n", ns, "spiffeids")["items"])
        with mesh.namespace("no-resource") as ns:
            deploy(ns, web(replicas=2), deployment("client", ["sleep", "infinity"]))
            registered = lambda: all(s.get("status", {}).get("entryId") for s in get("-n", ns, "spiffeids")["items"])
            wait("statuses", registered, 20)
            before = entries(ns)
            self.assertEqual(len(before), 3)
            load = Load(ns, pod_of(ns, "client"), "web", 8080)
            # An object alone comes back at once, with the same entry.
            kubectl("-n", ns, "delete", "spiffeids", "--all")
            back = lambda: len(get("-n", ns, "spiffeids")["items"]) == 3 and registered()
            wait("the objects", back, 10)
            self.assertEqual(entries(ns), before)
            kubectl("delete", "crd", DEFINITION, "--timeout=60s")
            try:
                self.failed("SpiffeID resource", "not defined")
                named = lambda: "does not know spiffeids" in mesh.pod_page("countersign-server-0", 9465, "/ready")
                wait("the registrar to name it", named, 60)
                ids = lambda: {e["id"] for e in json.loads(mesh.server("entry", "show", "--output=json"))}
                self.assertLessEqual(set(before), ids(), "nobody lost an identity")
            finally:
                mesh.apply(mesh.manifests())
            wait("the objects", back, 40)
            self.assertEqual(entries(ns), before)
            made, failed = load.end()
            self.assertEqual(failed, [])
            self.assertGreater(made, 200)
            self.a_new_pod_works(ns)
        all_is_well()

    def test_without_persistence_the_mesh_recovers_by_itself_from_the_loss_of_its_authority(self):
        def recovered(ns, before):
            """The mesh by its next root; the time that it took to get there."""
            began = time.monotonic()
            mesh.ready(180)
            wait("the next root", lambda: bundle() not in ([], before) and bundle() == root(), 60)
            self.a_new_pod_works(ns, 240)
            print(f"the mesh works {time.monotonic() - began:.0f} s after its authority was lost", flush=True)
            return bundle()

        remove_set = lambda: kubectl("-n", NAMESPACE, "delete", "statefulset", "countersign-server", "--wait=true")
        with mesh.namespace("lost-authority") as ns:
            deploy(ns, deployment("client", ["sleep", "infinity"]))
            last = root()
            try:
                remove_set()
                mesh.apply(mesh.manifests("server.persistence.enabled=false"))
                last = recovered(ns, last)
                self.assertIn("the server has none", found()["volume"]["found"])
                kubectl("-n", ns, "delete", "deployment", "fresh")
                mesh.delete_pods(NAMESPACE, "countersign-server-0")
                last = recovered(ns, last)
            finally:
                remove_set()
                mesh.apply(mesh.manifests())
                kubectl("-n", ns, "delete", "deployment", "fresh", "--ignore-not-found")
                recovered(ns, last)
        all_is_well(120)

    def test_a_volume_that_cannot_be_had_is_named_before_and_after(self):
        known = found("--before")["volume"]
        self.assertTrue(known["ok"], "bound already")
        before = lambda *sets: found("--before", "-n", "elsewhere", *(a for s in sets for a in ("--set", s)))["volume"]
        last = before()
        self.assertFalse(last["ok"])
        self.assertIn("no StorageClass is the default", last["found"])
        self.assertIn("server.persistence.enabled=false", last["mend"])
        self.assertIn("there is no StorageClass fast", before("server.persistence.storageClass=fast")["found"])
        self.assertTrue(before("server.persistence.enabled=false")["ok"])
        kubectl("-n", NAMESPACE, "apply", "-f", "-", input="apiVersion: v1\nkind: PersistentVolumeClaim\n"
                "metadata: {name: no-such-volume}\n"
                "spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}")
        try:
            said = lambda: "FailedBinding" in (c := found()["volume"])["found"] and c
            last = wait("the pending claim", said, 40)
            self.assertFalse(last["ok"])
            self.assertIn("PersistentVolumeClaim no-such-volume is Pending: FailedBinding: ", last["found"])
        finally:
            kubectl("-n", NAMESPACE, "delete", "pvc", "no-such-volume")
