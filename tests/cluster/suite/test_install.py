"""`install` on a cluster with an installation: what it remembers, what needs consent, and who wins of several."""
import json, os, pathlib, subprocess as sp, tempfile, unittest

import binaries, cluster, mesh
from mesh import NAMESPACE, kubectl
from suite.test_operator import countersign


def running():
    """The control plane's pods, by UID."""
    return sorted(p["metadata"]["uid"] for p in mesh.pods(NAMESPACE, "app.kubernetes.io/name=countersign"))


def memory():
    return mesh.get("-n", NAMESPACE, "configmap", "countersign-install")


def plan(*flags):
    """What `install` would do: its exit code and its plan."""
    done = countersign("install", "--dry-run", "--output=json", *flags)
    return done.returncode, json.loads(done.stdout)


class Install(unittest.TestCase):
    def setUp(self):
        mesh.install()

    def test_what_would_change_by_accident_is_said_exactly_and_not_printed(self):
        refused = countersign("install")
        self.assertEqual((refused.returncode, refused.stdout), (2, ""), "kubectl gets nothing")
        for line in (r"clusterName +test +-> +kubernetes",
                     r"mesh.mode +strict +-> +permissive +set before, not set now",
                     r"server.persistence.storageClass +local +-> "):
            self.assertRegex(refused.stderr, line)
        for setting, before in (("trustDomain=other", "cluster.local"), ("clusterName=other", "test"),
                                ("server.persistence.size=2Gi", "1Gi"), ("server.persistence.storageClass=x", "local"),
                                ("server.persistence.enabled=false", True)):
            name = setting.split("=")[0]
            done = countersign("install", "--reuse-values", "--set", setting)
            self.assertEqual((done.returncode, done.stdout), (2, ""), setting)
            self.assertIn(f"{name} would change, which needs --force", done.stderr)
            code, made = plan("--reuse-values", "--set", setting)
            self.assertEqual((code, made["allowed"]), (1, False))
            self.assertEqual([(c["setting"], c["before"]) for c in made["changes"]], [(name, before)])
            self.assertEqual(plan("--reuse-values", "--force", "--set", setting)[0], 0)
        code, made = plan("--reuse-values", "--set", "mesh.mode=permissive")
        self.assertEqual((code, [c["setting"] for c in made["changes"]]), (0, ["mesh.mode"]))
        self.assertEqual(made["remembered"]["values"]["clusterName"], "test")
        self.assertEqual(made["installed"]["values"], dict(made["remembered"]["values"], mesh={
            "mode": "strict", "allowExceptions": "lists,excepted,tenant-opened"}))
        # One that was made when the CSI driver was off unless it was asked for.
        kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-install", "--type=json", "-p",
                '[{"op":"remove","path":"/data/defaults"}]')
        code, made = plan("--reuse-values")
        self.assertEqual((code, [(c["setting"], c["before"], c["after"], c["note"]) for c in made["changes"]]),
                         (0, [("agent.csi.enabled", False, True, "its default has changed")]))
        kept = countersign("install", "--reuse-values", "--set", "agent.csi.enabled=false")
        self.assertEqual(kept.returncode, 0, kept.stderr)
        self.assertRegex(kept.stderr, "agent.csi.enabled=false: meshed pods mount .* root on a node")
        self.assertNotIn("hostPath", countersign("install", "--reuse-values").stderr)
        again = countersign("install", "-n", "elsewhere", "--reuse-values")
        self.assertEqual(again.returncode, 2)
        self.assertIn("no installation that remembers", again.stderr)

    def test_an_installation_in_another_namespace_and_one_without_memory_are_not_overwritten_by_accident(self):
        moved = countersign("install", "-n", "elsewhere")
        self.assertEqual((moved.returncode, moved.stdout), (2, ""))
        self.assertIn(f"belongs to an installation in namespace `{NAMESPACE}`", moved.stderr)
        kubectl("-n", NAMESPACE, "delete", "configmap", "countersign-install")
        forgotten = countersign("install")
        self.assertEqual((forgotten.returncode, forgotten.stdout), (2, ""))
        self.assertIn("does not remember its settings", forgotten.stderr)
        for line in (r"clusterName +test +-> +kubernetes", r"mesh.mode +strict +-> +permissive"):
            self.assertRegex(forgotten.stderr, line)
        mesh.install()

    def six_at_once(self, folder):
        """Six installations with lifetimes of their own, which restart no pod: those that won and those that lost."""
        runs = []
        for n in range(6):
            (folder / str(n)).unlink(missing_ok=True)
            command = cluster.operators(mesh.binary(), "install", "--reuse-values", "--apply", "--set",
                                        f"server.svidTTL={30 + n}m")
            env = dict(os.environ, PATH=f"{folder}:{os.environ['PATH']}", HEARD=str(folder / str(n)))
            runs.append(sp.Popen(command, env=env, text=True, stdout=sp.PIPE, stderr=sp.PIPE))
        ended = [(n, run.communicate(timeout=180)[1], run.returncode) for n, run in enumerate(runs)]
        for n, said, code in ended:
            if code:
                self.assertEqual(code, 1, said)
                self.assertIn("somebody else has installed", said)
                heard = folder / str(n)
                self.assertFalse(heard.exists() and heard.read_text(), "kubectl was told nothing")
        won, lost = ([n for n, _, code in ended if bool(code) == failed] for failed in (False, True))
        self.assertTrue(won, ended)
        self.assertIn(memory()["data"]["values.yaml"].split("svidTTL:")[1].split()[0], [f"{30 + n}m" for n in won])
        print(f"of six installations at once {len(won)} won", flush=True)
        return lost

    def test_of_several_at_once_one_wins_and_the_others_apply_nothing(self):
        before = running()
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            (folder / "kubectl").write_text(f"#!/bin/sh\ntee \"$HEARD\" | {binaries.build() / 'kubectl'} \"$@\"\n")
            (folder / "kubectl").chmod(0o755)
            # They meet nearly always; one after the other they all win.
            self.assertTrue(any(self.six_at_once(folder) for _ in range(5)), "none of them met another one")
        mesh.install()
        self.assertEqual(running(), before)

    def test_what_was_changed_by_hand_and_what_was_not_finished_is_said_and_a_dry_run_too(self):
        patch = lambda name, data: kubectl("-n", NAMESPACE, "patch", "configmap", name, "-p",
                                           json.dumps({"data": data}))
        patch("countersign-mesh", {"svidTTL": "5m"})
        try:
            tried = countersign("install", "--reuse-values", "--dry-run")
            self.assertEqual(tried.returncode, 0, tried.stderr)
            self.assertIn("svidTTL is 5m and becomes 1h; --set server.svidTTL=5m keeps it", tried.stderr)
            self.assertIn("a dry run: nothing was changed\n", tried.stderr)
            patch("countersign-install", {"pending": "logLevel: debug\n"})
            said = countersign("install", "--reuse-values", "--dry-run").stderr
            self.assertRegex(said, r"was interrupted, or another one goes on, with other settings \(.*logLevel")
        finally:
            mesh.install()
        self.assertEqual(memory()["data"]["pending"], "", "it was applied as a whole")

    def test_an_upgrade_that_keeps_its_settings_restarts_nothing(self):
        before, remembered = running(), memory()["data"]
        manifests = countersign("install", "--reuse-values")
        self.assertEqual(manifests.returncode, 0, manifests.stderr)
        mesh.apply(manifests.stdout)
        mesh.ready()
        self.assertEqual((running(), memory()["data"]), (before, remembered))
        kubectl("-n", NAMESPACE, "patch", "configmap", "countersign-install", "-p", '{"data":{"values.yaml":"["}}')
        damaged = countersign("install")
        self.assertEqual((damaged.returncode, damaged.stdout), (2, ""))
        self.assertIn("cannot be read: key `values.yaml`", damaged.stderr)
        mesh.install()
        self.assertEqual(memory()["data"], remembered)
