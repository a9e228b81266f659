"""`tests/cluster/run`: the cluster up, its tests, the cluster down. The whole suite has two clusters, at once."""
import concurrent.futures, os, pathlib, re, signal, subprocess as sp, sys, tempfile, time, unittest

import cluster, images, mesh

# These leave the mesh as it is, but for tests that are marked with `mesh.alone`, and so run at once, the longest first.
TOGETHER = [f"suite.test_{name}" for name in ("traffic", "identity", "tenants", "injection", "limits", "support")]
AT_ONCE = 3
# These change the mesh, one after the other: in the cluster of the ones above, and in another.
FIRST = [f"suite.test_{name}" for name in ("operator", "check", "faults", "rotation")]
SECOND = [f"suite.test_{name}" for name in (
    "bootstrap", "csi", "services", "repair", "plain", "rbac.Rbac.test_nothing_that_is_needed_is_refused", "cni",
    "install", "uninstall", "helm", "guide")]
# Seconds that the tests of a module may take: several times what the longest does.
LONGEST = 900
# At the end in the first cluster, by what was done in both.
LAST = "suite.test_rbac"
# The second cluster's `COUNTERSIGN_CLUSTER`.
OTHER = f"{cluster.TAG}2"


def up(built=None):
    """The cluster with Countersign in it; `built`: a folder with the images."""
    if built:
        cluster.up(images.archives(built))
    else:
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


def loaded(names):
    return cases(unittest.defaultTestLoader.loadTestsFromNames(names))


def is_alone(case):
    return getattr(getattr(case, case._testMethodName, None), "alone", False)


def any_alone(name):
    return any(map(is_alone, loaded([name])))


def run(names, only=lambda case: True):
    """Runs tests in this process; how many passed and how many did not."""
    suite = unittest.TestSuite(filter(only, loaded(names)))
    result = unittest.TextTestRunner(verbosity=2, stream=sys.stdout, resultclass=Timed).run(suite)
    if not result.wasSuccessful():
        report()
    for test, why in result.skipped:
        print(f"skipped: {test}: {why}")
    bad = len(result.failures) + len(result.errors)
    return result.testsRun - bad, bad + len(result.skipped)


def command(tag, *args):
    """This script for one of the clusters, in a process of its own: what it printed, and whether it did its work."""
    child = sp.Popen([sys.executable, "-B", __file__, *args], stdout=sp.PIPE, stderr=sp.STDOUT, text=True,
                     env={**os.environ, "COUNTERSIGN_CLUSTER": tag}, start_new_session=True)
    try:
        printed, _ = child.communicate(timeout=LONGEST)
    except sp.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        printed, _ = child.communicate()
        printed += f"\n{' '.join(args)} was not done after {LONGEST} s"
    return printed.rstrip(), child.returncode == 0


def run_apart(tag, name, which="--apart"):
    """Runs a module's tests in one of the clusters, and prints what it says at its end; the same numbers."""
    began = time.monotonic()
    printed, _ = command(tag, which, name)
    print(f"{printed}\n{name} took {time.monotonic() - began:.0f} s in cluster {tag or 1}\n", flush=True)
    told = re.search(r"^apart: (\d+) passed; (\d+) failed$", printed, re.MULTILINE)
    return (int(told[1]), int(told[2])) if told else (0, 1)


def in_first(built):
    begin(cluster.TAG, built)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        results = [*pool.map(lambda name: run_apart(cluster.TAG, name, "--beside"), TOGETHER)]
    results += [run_apart(cluster.TAG, name, "--alone") for name in TOGETHER if any_alone(name)]
    return results + [run_apart(cluster.TAG, name) for name in FIRST]


def in_second(built):
    begin(OTHER, built)
    return [run_apart(OTHER, name) for name in SECOND]


def begin(tag, built):
    began = time.monotonic()
    printed, up = command(tag, "--begin", built)
    print(f"{printed}\ncluster {tag or 1} took {time.monotonic() - began:.0f} s\n", flush=True)
    if not up:
        raise SystemExit(f"cluster {tag or 1} did not come up")


def whole():
    """The whole suite; the same numbers."""
    try:
        with tempfile.TemporaryDirectory() as built:
            images.build(pathlib.Path(built))
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                lanes = [pool.submit(lane, built) for lane in (in_first, in_second)]
            results = [numbers for lane in lanes for numbers in lane.result()]
            results.append(run_apart(cluster.TAG, LAST))
    finally:
        print(command(OTHER, "down")[0])
    return [sum(numbers) for numbers in zip(*results)]


# Of a module: all tests, those that run beside other modules, those that do not.
PARTS = {"--apart": lambda case: True, "--beside": lambda case: not is_alone(case), "--alone": is_alone}


def main(args):
    if args[:1] == ["down"]:
        return cluster.down()
    if args[:1] == ["up"]:
        up()
        print(f"KUBECONFIG={cluster.STATE}/pki/admin.conf, from inside:"
              f" nsenter --net=/run/netns/{cluster.NODES[0].netns} kubectl …")
        return None
    if args[:1] == ["--begin"]:
        return up(pathlib.Path(args[1]))
    if args and args[0] in PARTS:
        passed, failed = run(args[1:], PARTS[args[0]])
        print(f"apart: {passed} passed; {failed} failed")
        return 1 if failed else 0
    keep = "--keep" in args
    tests = [a for a in args if a != "--keep"]
    unknown = [a for a in tests if a.startswith("-")] or [
        c.id() for c in loaded(tests) if type(c).__name__ == "_FailedTest"]
    if unknown:
        print(f"tests/cluster/run: {unknown[0]} is no option and no test; see --help", file=sys.stderr)
        return 2
    try:
        if tests:
            if not keep or not cluster.STATE.exists():
                up()
            passed, failed = run(tests)
        else:
            passed, failed = whole()
    finally:
        if not keep:
            cluster.down()
    print(f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
