"""`tests/cluster/run`: the cluster up, its tests, the cluster down."""
import pathlib, sys, tempfile, unittest

import cluster, images, mesh

SUITE = [f"suite.test_{name}" for name in ("bootstrap", "injection", "identity", "tenants", "traffic", "operator",
                                           "faults", "rotation", "plain", "uninstall", "helm", "guide")]


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


def main(args):
    if args[:1] == ["down"]:
        return cluster.down()
    if args[:1] == ["up"]:
        up()
        print(f"KUBECONFIG={cluster.STATE}/pki/admin.conf, from inside:"
              f" nsenter --net=/run/netns/{cluster.NODES[0].netns} kubectl …")
        return None
    keep = "--keep" in args
    tests = [a for a in args if a != "--keep"] or SUITE
    try:
        if not keep or not cluster.STATE.exists():
            up()
        loaded = unittest.defaultTestLoader.loadTestsFromNames(tests)
        result = unittest.TextTestRunner(verbosity=2, stream=sys.stdout).run(loaded)
        if not result.wasSuccessful():
            report()
    finally:
        if not keep:
            cluster.down()
    bad = len(result.failures) + len(result.errors)
    print(f"test result: {'ok' if not bad else 'FAILED'}. {result.testsRun - bad} passed; {bad} failed")
    for test, why in result.skipped:
        print(f"skipped: {test}: {why}")
    return 1 if bad or result.skipped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
