"""`tests/cluster/run`: the cluster up, its tests, the cluster down."""
import concurrent.futures, pathlib, re, subprocess as sp, sys, tempfile, time, unittest

import cluster, images, mesh

# These leave the mesh as it is, but for tests that are marked with `mesh.alone`, and so run at once, the longest first.
TOGETHER = [f"suite.test_{name}" for name in ("traffic", "identity", "tenants", "injection", "limits", "support")]
AT_ONCE = 3
# These change the mesh, one after the other.
SUITE = [f"suite.test_{name}" for name in (
    "bootstrap", "csi", "services", "operator", "check", "faults", "rotation", "repair", "plain", "rbac", "cni",
    "install", "uninstall", "helm", "guide")]


def up():
    with tempfile.TemporaryDirectory() as folder:
        cluster.up(images.build(pathlib.Path(folder)))
    mesh.install()


def report():
    """What the control plane says, for whoever reads of a failure where the cluster is gone."""
    print(cluster.kubectl("get", "pods", "-A", "-o", "wide", check=False).stdout)
    for pod in mesh.pods(mesh.NAMESPACE, "app.kubernetes.io/name=countersign"):
        for container in pod["spec"]["containers"]:
            print(f"--- {pod['metadata']['name']} {container['name']}")
            print(cluster.kubectl("-n", mesh.NAMESPACE, "logs", pod["metadata"]["name"], "-c", container["name"],
                                  "--tail=15", check=False).stdout)


class Timed(unittest.TextTestResult):
    """Says how long each test took."""

    def startTest(self, test):
        self.began = time.monotonic()
        super().startTest(test)

    def addSuccess(self, test):
        unittest.TestResult.addSuccess(self, test)
        self.stream.writeln(f"ok ({time.monotonic() - self.began:.0f} s)")


def cases(suite):
    for test in suite:
        yield from cases(test) if isinstance(test, unittest.TestSuite) else (test,)


def is_alone(case):
    return getattr(getattr(case, case._testMethodName, None), "alone", False)


def run(names, only=lambda case: True):
    """Runs tests in this process; how many passed and how many did not."""
    loaded = unittest.TestSuite(filter(only, cases(unittest.defaultTestLoader.loadTestsFromNames(names))))
    result = unittest.TextTestRunner(verbosity=2, stream=sys.stdout, resultclass=Timed).run(loaded)
    if not result.wasSuccessful():
        report()
    for test, why in result.skipped:
        print(f"skipped: {test}: {why}")
    bad = len(result.failures) + len(result.errors)
    return result.testsRun - bad, bad + len(result.skipped)


def run_apart(name):
    """Runs a module's tests in a process of its own, and prints what it says at its end; the same numbers."""
    began = time.monotonic()
    done = sp.run([sys.executable, "-B", __file__, "--apart", name], stdout=sp.PIPE, stderr=sp.STDOUT, text=True)
    print(f"{done.stdout.rstrip()}\n{name} took {time.monotonic() - began:.0f} s\n", flush=True)
    told = re.search(r"^apart: (\d+) passed; (\d+) failed$", done.stdout, re.MULTILINE)
    return (int(told[1]), int(told[2])) if told else (0, 1)


def whole():
    """The whole suite; the same numbers."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        results = [*pool.map(run_apart, TOGETHER)]
    results.append(run(TOGETHER, is_alone))
    results.append(run(SUITE))
    return [sum(numbers) for numbers in zip(*results)]


def main(args):
    if args[:1] == ["down"]:
        return cluster.down()
    if args[:1] == ["up"]:
        up()
        print(f"KUBECONFIG={cluster.STATE}/pki/admin.conf, from inside:"
              f" nsenter --net=/run/netns/{cluster.NODES[0].netns} kubectl …")
        return None
    if args[:1] == ["--apart"]:
        passed, failed = run(args[1:], lambda case: not is_alone(case))
        print(f"apart: {passed} passed; {failed} failed")
        return 1 if failed else 0
    keep = "--keep" in args
    tests = [a for a in args if a != "--keep"]
    unknown = [a for a in tests if a.startswith("-")] or [c.id() for c in cases(
        unittest.defaultTestLoader.loadTestsFromNames(tests)) if type(c).__name__ == "_FailedTest"]
    if unknown:
        print(f"tests/cluster/run: {unknown[0]} is no option and no test; see --help", file=sys.stderr)
        return 2
    try:
        if not keep or not cluster.STATE.exists():
            up()
        passed, failed = run(tests) if tests else whole()
    finally:
        if not keep:
            cluster.down()
    print(f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
