"""docs/kubernetes.md, followed as it is written: every command of its console blocks, in order, on a bare cluster."""
import os, pathlib, re, subprocess as sp, tempfile, unittest

import binaries, cluster, images, mesh
from mesh import deploy, deployment, kubectl

GUIDE = images.ROOT / "docs" / "kubernetes.md"


class Guide(unittest.TestCase):
    def test_every_command_of_the_guide_works(self):
        commands = [line for block in re.findall(r"```console\n(.*?)```", GUIDE.read_text(), re.S)
                    for line in block.splitlines()]
        self.assertGreater(len(commands), 12)
        left = kubectl("get", "namespace", "countersign", "-o", "name", check=False)
        self.assertNotEqual(left.returncode, 0, "the guide begins without an installation")
        for node in mesh.NODES:
            node.run("bash", "-c", "rm -rf /var/lib/countersign/*")
        kubectl("delete", "pv", "countersign-data", "--ignore-not-found")
        # A volume for whoever asks for none in particular, and an application that was there before.
        mesh.apply(mesh.VOLUME.replace("storageClassName: local", "storageClassName: ''"))
        kubectl("create", "namespace", "shop")
        deploy("shop", deployment("web", ["python3", "-m", "http.server", "8000"], port=8000, replicas=2))
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder)
            (place / "kubectl").symlink_to(binaries.build() / "kubectl")
            (place / "countersign").symlink_to(mesh.binary())
            sp.run("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout ca.key"
                   " -out ca.crt -subj /CN=own && cp ca.crt partner.pem", shell=True, check=True, cwd=folder,
                   stdout=sp.DEVNULL, stderr=sp.DEVNULL)
            for command in commands:
                # The registry is the reader's own; here the image is on the nodes already.
                here = command.replace("registry.example.org/countersign:0.1.0", images.COUNTERSIGN)
                built = f" --binary {os.environ['COUNTERSIGN_BINARY']}" if "COUNTERSIGN_BINARY" in os.environ else ""
                here = here.replace("images/build", f"{images.ROOT / 'images' / 'build'}{built}")
                script = f"export PATH={folder}:$PATH; cd {folder}; set -eo pipefail; {here}"
                done = sp.run(cluster.operators("bash", "-c", script), text=True, capture_output=True, timeout=180)
                self.assertEqual(done.returncode, 0, f"{command}\n{done.stdout}\n{done.stderr}")
