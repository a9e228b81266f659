"""The peers of the race: how each is started as one side of a sidecar pair.

Side `a` takes plaintext and sends mTLS, side `b` the reverse. Every peer runs one worker, TLS 1.3 without tickets or
resumption, and verifies the other side against PKI/ca.crt.
"""
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """One side of a pair: where it listens, where it sends, and where its files are."""

    name: str
    listen: str
    port: int
    target: str
    target_port: int
    pki: pathlib.Path
    work: pathlib.Path

    def file(self, peer: str, text: str) -> pathlib.Path:
        """Writes a settings file of its own."""
        path = self.work / f"{peer}-{self.name}-{self.port}"
        path.write_text(text)
        return path


TLS_V3 = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
TCP_PROXY = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"


def envoy(program: str) -> Callable[[Side], list[str]]:
    """Envoy, from the program at this path."""

    def command(side: Side) -> list[str]:
        certificate = {
            "certificate_chain": {"filename": f"{side.pki}/{side.name}.crt"},
            "private_key": {"filename": f"{side.pki}/{side.name}.key"},
        }
        common = {
            "common_tls_context": {
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
                "tls_certificates": [certificate],
                "validation_context": {"trusted_ca": {"filename": f"{side.pki}/ca.crt"}},
            }
        }
        tcp = {"name": "tcp", "typed_config": {"@type": TCP_PROXY, "stat_prefix": "t", "cluster": "c"}}
        chain: dict = {"filters": [tcp]}
        target = {"socket_address": {"address": side.target, "port_value": side.target_port}}
        cluster: dict = {
            "name": "c",
            "type": "STATIC",
            "connect_timeout": "5s",
            "load_assignment": {
                "cluster_name": "c",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": target}}]}],
            },
            "circuit_breakers": {"thresholds": [{"max_connections": 100000, "max_pending_requests": 100000}]},
        }
        if side.name == "a":
            cluster["transport_socket"] = {
                "name": "tls",
                "typed_config": {"@type": f"{TLS_V3}UpstreamTlsContext", **common},
            }
        else:
            down = {
                "@type": f"{TLS_V3}DownstreamTlsContext",
                **common,
                "require_client_certificate": True,
                "disable_stateless_session_resumption": True,
                "disable_stateful_session_resumption": True,
            }
            chain["transport_socket"] = {"name": "tls", "typed_config": down}
        listen = {"socket_address": {"address": side.listen, "port_value": side.port}}
        listener = {"name": "l", "address": listen, "filter_chains": [chain]}
        config = {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
        path = side.file("envoy", json.dumps(config)).rename(side.work / f"envoy-{side.name}-{side.port}.json")
        flags = ["--concurrency", "1", "--disable-hot-restart", "-l", "error", "--base-id", str(side.port)]
        return [program, "-c", str(path), *flags]

    return command


def nginx(side: Side) -> list[str]:
    """nginx's stream module."""
    if side.name == "a":
        # nginx verifies a DNS name, and these leaves have none, so side a does not verify: nginx's figure is flattered.
        tls = (
            f"proxy_ssl on; proxy_ssl_protocols TLSv1.3; proxy_ssl_certificate {side.pki}/a.crt;"
            f" proxy_ssl_certificate_key {side.pki}/a.key; proxy_ssl_trusted_certificate {side.pki}/ca.crt;"
            " proxy_ssl_verify off; proxy_ssl_name x; proxy_ssl_session_reuse off;"
        )
        listen = f"{side.listen}:{side.port}"
    else:
        tls = (
            f"ssl_protocols TLSv1.3; ssl_certificate {side.pki}/b.crt; ssl_certificate_key {side.pki}/b.key;"
            f" ssl_client_certificate {side.pki}/ca.crt; ssl_verify_client on; ssl_session_cache off;"
            " ssl_session_tickets off;"
        )
        listen = f"{side.listen}:{side.port} ssl"
    folder = side.work / f"nginx-run-{side.name}-{side.port}"
    folder.mkdir(exist_ok=True)
    config = side.file(
        "nginx",
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n"
        f"user root; worker_processes 1; daemon off; pid {folder}/pid; error_log /dev/null;\n"
        "events { worker_connections 16000; }\n"
        f"stream {{ server {{ listen {listen} backlog=4096; proxy_pass {side.target}:{side.target_port}; {tls} }} }}\n",
    )
    return ["nginx", "-c", str(config), "-p", str(folder)]


def haproxy(side: Side) -> list[str]:
    """HAProxy in TCP mode."""
    options = "ssl-min-ver TLSv1.3 no-tls-tickets"
    bind, server = f"bind {side.listen}:{side.port}", f"server s {side.target}:{side.target_port}"
    if side.name == "b":
        bind += f" ssl crt {side.pki}/b.pem ca-file {side.pki}/ca.crt verify required {options}"
    else:
        server += f" ssl crt {side.pki}/a.pem ca-file {side.pki}/ca.crt verify required {options} no-ssl-reuse"
    config = side.file(
        "haproxy",
        "global\n nbthread 1\n maxconn 9000\n tune.ssl.cachesize 0\n"
        "defaults\n mode tcp\n timeout connect 5s\n timeout client 300s\n timeout server 300s\n"
        f"listen l\n {bind}\n {server}\n",
    )
    return ["haproxy", "-db", "-f", str(config)]


def script(path: str) -> Callable[[Side], list[str]]:
    """A peer of its own: `SCRIPT a|b LISTEN_IP LISTEN_PORT TARGET_IP TARGET_PORT PKIDIR`, which becomes the proxy."""

    def command(side: Side) -> list[str]:
        return [path, side.name, side.listen, str(side.port), side.target, str(side.target_port), str(side.pki)]

    return command
