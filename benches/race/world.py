"""Two network namespaces joined by a veth pair, certificates for both sides, and the servers behind side b."""
import pathlib
import subprocess as sp
import time

A, B = "cs-race-a", "cs-race-b"
IP_A, IP_B = "10.77.0.1", "10.77.0.2"
HTTP, IPERF = 8080, 5201


def sh(command: str, check: bool = True) -> str:
    """Runs a line of shell and returns what it printed."""
    done = sp.run(command, shell=True, check=False, stdout=sp.PIPE, stderr=sp.STDOUT, text=True)
    if check and done.returncode:
        raise SystemExit(f"`{command}` ended with {done.returncode}: {done.stdout}")
    return done.stdout


def inside(namespace: str, argv: list[str]) -> list[str]:
    """The command that runs another one in a namespace."""
    return ["ip", "netns", "exec", namespace, *argv]


EXTENSIONS = """subjectAltName=URI:spiffe://bench.test/ns/default/sa/{side}
extendedKeyUsage=serverAuth,clientAuth
keyUsage=critical,digitalSignature
basicConstraints=critical,CA:false
"""


class World:
    """What every pair runs in."""

    def __init__(self, work: pathlib.Path) -> None:
        self.work, self.pki = work, work / "pki"
        self.servers: list[sp.Popen] = []

    def __enter__(self) -> "World":
        self.remove()
        self.pki.mkdir()
        for namespace in (A, B):
            sh(f"ip netns add {namespace} && ip -n {namespace} link set lo up")
        sh("ip link add cs-race-va type veth peer name cs-race-vb")
        for namespace, link, address in ((A, "cs-race-va", IP_A), (B, "cs-race-vb", IP_B)):
            sh(f"ip link set {link} netns {namespace}")
            sh(f"ip -n {namespace} addr add {address}/24 dev {link} && ip -n {namespace} link set {link} up")
        self.certificates()
        self.serve()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.wait(10)
        self.remove()

    @staticmethod
    def remove() -> None:
        """Removes the namespaces, also those of a run that was killed."""
        for namespace in (A, B):
            sh(f"ip netns del {namespace}", check=False)

    def certificates(self) -> None:
        """One CA, and an ECDSA P-256 leaf with a SPIFFE ID for each side."""
        new_key = "openssl ecparam -name prime256v1 -genkey -noout"
        at = f"cd {self.pki};"
        sh(f"{at} {new_key} -out ca.key && openssl req -x509 -new -key ca.key -days 2 -subj /O=bench -out ca.crt")
        for side in ("a", "b"):
            (self.pki / f"{side}.ext").write_text(EXTENSIONS.format(side=side))
            sh(f"{at} {new_key} | openssl pkcs8 -topk8 -nocrypt -out {side}.key")
            sh(f"{at} openssl req -new -key {side}.key -subj /O=bench -out {side}.csr")
            sh(
                f"{at} openssl x509 -req -in {side}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2"
                f" -extfile {side}.ext -out {side}.crt && cat {side}.crt {side}.key > {side}.pem"
            )

    def serve(self) -> None:
        """An HTTP server that answers from memory, and iperf3."""
        config = self.work / "server.conf"
        config.write_text(
            f"user root; worker_processes 1; daemon off; pid {self.work}/server.pid; error_log /dev/null;\n"
            "events { worker_connections 16000; }\n"
            "http { access_log off; keepalive_requests 100000000; keepalive_timeout 300s;\n"
            f" server {{ listen {HTTP} backlog=4096; location / {{ return 200 '{'x' * 128}'; }} }} }}\n"
        )
        nginx = inside(B, ["nginx", "-c", str(config), "-p", str(self.work)])
        iperf = inside(B, ["iperf3", "-s"])
        self.servers = [sp.Popen(argv, stdout=sp.DEVNULL, stderr=sp.DEVNULL) for argv in (nginx, iperf)]
        for port in (HTTP, IPERF):
            wait_for_port(B, port)


def wait_for_port(namespace: str, port: int) -> None:
    """Waits until somebody listens."""
    end = time.monotonic() + 10
    while True:
        if sh(f"ip netns exec {namespace} ss -Hltn 'sport = :{port}'").strip():
            return
        if time.monotonic() > end:
            raise SystemExit(f"nobody listens on port {port} of {namespace}")
        time.sleep(0.05)
