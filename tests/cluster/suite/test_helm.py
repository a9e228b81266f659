"""The chart in the hands of Helm itself, 3 and 4: the same objects as `countersign install`, a mesh that works, and a
clean end."""
import json, pathlib, shutil, subprocess as sp, tempfile, unittest

import binaries, cluster, images, mesh
from mesh import NAMESPACE, deploy, deployment, kubectl, pod_of, run_in, web
from suite.test_operator import countersign

CHART = images.ROOT / "charts" / "countersign"
SETTINGS = [f"image.name={images.COUNTERSIGN}", "image.pullPolicy=Never", "clusterName=test",
            "server.persistence.storageClass=local", "mesh.mode=strict"]
# Settings that are lists and objects; a label of ours that must not change.
STRUCTURED = """
imagePullSecrets: [{name: registry}]
server:
  resources: {limits: {cpu: 2, memory: 1Gi}}
  tolerations: [{key: "node-role.kubernetes.io/control-plane", operator: Exists, effect: NoSchedule}]
  nodeSelector: {kubernetes.io/os: linux}
  podLabels: {team: "a & b <c>", countersign.dev/inject: enabled}
  podAnnotations: {note: "x: #y {{ z }}"}
agent:
  tolerations: []
  priorityClassName: ""
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms: [{matchExpressions: [{key: agents, operator: NotIn, values: ["no"]}]}]
  resources: {requests: {memory: null}}
registrar: {resources: {requests: {cpu: 0.1}}}
injector:
  topologySpreadConstraints: [{maxSkew: 2, topologyKey: zone, whenUnsatisfiable: DoNotSchedule}]
sidecar: {resources: {limits: {cpu: 500m}, requests: {memory: ""}}}
redirect: {resources: {limits: {cpu: 1}}}
"""
# Text that would end the text around it, or be another kind of value, if it were not quoted.
TEXT = "a\"b': {c}, #d\n- e: \\f <g> %s {{ h }}"
HOSTILE = {
    "registrar": {"idTemplate": TEXT}, "agent": {"kubeletCA": TEXT}, "trustDomain": "1e3",
    "server": {"upstreamSecret": TEXT, "priorityClassName": TEXT, "podLabels": {"a": TEXT}},
    "injector": {"webhook": {"namespaceSelector": {"matchLabels": {TEXT: TEXT}}}},
}
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


def older(folder):
    """A copy of the chart that does not know one setting yet."""
    chart = pathlib.Path(folder) / "countersign"
    shutil.copytree(CHART, chart)
    values = (chart / "values.yaml").read_text()
    (chart / "values.yaml").write_text(values.replace("\n  cniRedirect: true\n", "\n"))
    schema = json.loads((chart / "values.schema.json").read_text())
    schema["properties"]["injector"]["properties"].pop("cniRedirect")
    schema["properties"]["injector"]["required"].remove("cniRedirect")
    (chart / "values.schema.json").write_text(json.dumps(schema))
    return chart


class Helm(unittest.TestCase):
    def settings(self, *more):
        return [a for s in (*SETTINGS, *more) for a in ("--set", s)]

    def same(self, *args):
        """Ours and theirs say the same with these arguments; returns what."""
        ours = objects(sp.check_output([mesh.binary(), "install", *args], text=True))
        # Helm makes the namespace, and has its own memory.
        ours.pop(("Namespace", NAMESPACE))
        ours.pop(("ConfigMap", "countersign-install"))
        self.assertGreater(len(ours), 15)
        for version in binaries.HELM:
            theirs = objects(helm(version, "template", "countersign", CHART, "-n", NAMESPACE, "--include-crds",
                                  *KUBERNETES, *args).stdout)
            self.assertEqual(sorted(theirs), sorted(ours))
            for key, wanted in ours.items():
                self.assertEqual(theirs[key], wanted, f"{version}: {key}")
        return ours

    def test_a_pod_monitor_is_the_same_by_both(self):
        """Compared as text: the cluster does not know the kind."""
        def monitor(text):
            one = [d for d in text.split("---\n") if "kind: PodMonitor" in d]
            return [[line for line in d.splitlines() if line and not line.lstrip().startswith("#")] for d in one]
        args = self.settings("podMonitor.enabled=true", "podMonitor.interval=1m", "podMonitor.labels.release=x")
        ours = monitor(sp.check_output([mesh.binary(), "install", *args], text=True))
        self.assertEqual(len(ours), 1)
        for version in binaries.HELM:
            rendered = helm(version, "template", "countersign", CHART, "-n", NAMESPACE, *KUBERNETES, *args).stdout
            self.assertEqual(monitor(rendered), ours, version)

    def test_the_chart_renders_to_what_install_prints(self):
        for more in ([], ["server.upstreamSecret=ca", "agent.nodesProxyPermission=true", "injector.replicas=3",
                          "injector.nativeSidecars=false", "injector.resources.limits.memory=1Gi"]):
            self.same(*self.settings(*more))
        self.same(*self.settings("injector.webhook.failurePolicy=Ignore",
                                 "server.serviceAccount.create=false", "agent.serviceAccount.name=own",
                                 "agent.csi.enabled=false", "cni.enabled=true", "injector.cniRedirect=false",
                                 "agent.kubeletPort=10251"))
        with tempfile.TemporaryDirectory() as folder:
            hostile = pathlib.Path(folder) / "hostile.json"
            hostile.write_text(json.dumps(HOSTILE))
            self.same("--values", str(hostile), *self.settings())
            values = pathlib.Path(folder) / "values.yaml"
            values.write_text(STRUCTURED)
            made = self.same("--values", str(values), *self.settings())
        pod = made["StatefulSet", "countersign-server"]["spec"]["template"]
        self.assertEqual(pod["metadata"]["labels"]["team"], "a & b <c>")
        self.assertEqual(pod["metadata"]["labels"]["countersign.dev/inject"], "disabled")
        self.assertEqual(pod["spec"]["containers"][0]["resources"],
                         {"requests": {"cpu": "50m", "memory": "32Mi"}, "limits": {"cpu": 2, "memory": "1Gi"}})
        agent = made["DaemonSet", "countersign-agent"]["spec"]["template"]["spec"]
        self.assertFalse({"tolerations", "priorityClassName"} & set(agent), "empty is none")
        self.assertEqual(agent["containers"][0]["resources"]["requests"], {"cpu": "20m"})
        for version in binaries.HELM:
            helm(version, "lint", "--strict", *KUBERNETES, CHART)
            refused = helm(version, "template", "countersign", CHART, *KUBERNETES, "--set", "mesh.mode=tight",
                           check=False)
            self.assertNotEqual(refused.returncode, 0, "the schema judges")
            self.assertIn("mode", refused.stderr)
            missing = helm(version, "template", "countersign", CHART, *KUBERNETES, "--set", "injector.cniRedirect=null",
                           check=False)
            self.assertNotEqual(missing.returncode, 0, "what is missing is not off")
            self.assertIn("cniRedirect", missing.stderr)
            said = lambda *sets: helm(version, "install", "x", CHART, "--dry-run=client", *self.settings(*sets)).stdout
            for setting in ("agent.csi.enabled=false", "injector.csiVolumes=false"):
                self.assertRegex(said(setting), f"(?m)^{setting}: .* root on a node")
            self.assertNotIn("root on a node", said())

    def test_a_mesh_of_each_helm_works_is_changed_without_a_restart_and_goes(self):
        self.assertNotEqual(kubectl("get", "namespace", NAMESPACE, "-o", "name", check=False).returncode, 0)
        for version in binaries.HELM:
            kubectl("delete", "pv", "countersign-data", "--ignore-not-found")
            for node in mesh.NODES:
                node.run("bash", "-c", "rm -rf /var/lib/countersign/*")
            mesh.apply(mesh.VOLUME)
            with tempfile.TemporaryDirectory() as folder:
                helm(version, "install", "countersign", older(folder), "-n", NAMESPACE, "--create-namespace",
                     *self.settings())
            mesh.ready()
            done = countersign("check")
            self.assertEqual(done.returncode, 0, done.stdout)
            refused = countersign("install", "--force")
            self.assertEqual((refused.returncode, refused.stdout), (2, ""))
            self.assertIn("release `countersign`): change it by `helm upgrade`", refused.stderr)
            with mesh.namespace(f"by-helm-{version[1]}") as ns:
                deploy(ns, web(), deployment("client", ["sleep", "infinity"]))
                self.assertEqual(run_in(ns, pod_of(ns, "client"), "curl", "-sSf", "-m", "10", "http://web:8080/"), "ok")
            running = lambda: sorted(p["metadata"]["uid"]
                                     for p in mesh.pods(NAMESPACE, "app.kubernetes.io/name=countersign"))
            before = running()
            reused = helm(version, "upgrade", "countersign", CHART, "-n", NAMESPACE, "--reuse-values", check=False)
            self.assertNotEqual(reused.returncode, 0, "a setting that is missing is not one that is off")
            self.assertIn("cniRedirect", reused.stderr)
            helm(version, "upgrade", "countersign", CHART, "-n", NAMESPACE,
                 *self.settings("mesh.mode=permissive", "server.svidTTL=30m", "agent.workloadKeyType=ec-p384"))
            self.assertEqual(mesh.get("-n", NAMESPACE, "configmap", "countersign-mesh")["data"]["svidTTL"], "30m")
            mesh.ready()
            self.assertEqual(running(), before, "mode, TTLs and key types restart nothing")
            # Without the driver its pods could not end.
            mesh.gone(ns)
            helm(version, "uninstall", "countersign", "-n", NAMESPACE)
            kubectl("delete", "namespace", NAMESPACE, "--timeout=90s")
            kubectl("delete", "crd", "spiffeids.spiffeid.spiffe.io", "--timeout=60s")
