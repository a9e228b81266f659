"""Unmodified services that talk over the mesh, under strict."""
import json, subprocess as sp, tempfile, time, unittest

import binaries, cluster, images, mesh
from mesh import deploy, deployment, get, kubectl, pod_of, run_in, wait

SHOP = {"productpage": 1, "details": 1, "reviews": 2, "ratings": 1}
# Requests without end, over new and kept connections; each failure is a line. Ends when its input does.
LOAD = r"""
import http.client, sys, threading, time
host, port, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
stop, count, failures = threading.Event(), [0], []
def work(keep):
    c, used = None, False
    while not stop.is_set():
        try:
            if c is None or not keep:
                c, used = http.client.HTTPConnection(host, port, timeout=15), False
            c.request("GET", path); r = c.getresponse(); body = r.read()
            if r.status != 200: failures.append(f"{r.status} {body[:200]!r}")
            count[0] += 1; used = keep
            if not keep or r.getheader("connection") == "close": c.close(); c = None
        except http.client.RemoteDisconnected as e:
            # A kept connection that the server has ended, cleanly and between two requests, is opened anew (RFC 9112
            # 9.3.1); a cut or a reset is never passed over.
            if not keep or c is None or not used:
                failures.append(f"{time.time():.3f} keep={keep} {type(e).__name__}: {e}")
            c, used = None, False
        except Exception as e:
            failures.append(f"{time.time():.3f} keep={keep} {type(e).__name__}: {e}"); c = None
        time.sleep(0.01)
threads = [threading.Thread(target=work, args=(k,)) for k in (False, False, True)]
[t.start() for t in threads]
print("begun", flush=True)
sys.stdin.read()
stop.set(); [t.join() for t in threads]
print("requests", count[0]); [print("failed", f) for f in failures]
"""


def shop(ns):
    probe = """readinessProbe: {httpGet: {path: /, port: 9080}, periodSeconds: 2}
          livenessProbe: {tcpSocket: {port: 9080}, periodSeconds: 2, failureThreshold: 2}"""
    leaf = probe
    # What asks others is ready when its own port answers: its readiness must not depend on theirs.
    inner = probe.replace("httpGet: {path: /, port: 9080}", "tcpSocket: {port: 9080}")
    return [deployment(name, ["shop", name], image=images.COUNTERSIGN, replicas=n, port=9080,
                       container=leaf if name in ("details", "ratings") else inner) for name, n in SHOP.items()]


class Load:
    """Constant requests from a pod while something happens."""

    def __init__(self, ns, pod, host, port, path="/"):
        command = cluster.kubectl_command("-n", ns, "exec", "-i", pod, "-c", "app", "--", "python3", "-c", LOAD, host,
                                          port, path)
        self.process = sp.Popen(command, stdin=sp.PIPE, stdout=sp.PIPE, stderr=sp.STDOUT, text=True)
        assert self.process.stdout.readline().strip() == "begun", self.process.stdout.read()

    def end(self):
        """Requests made, and those that failed."""
        out, _ = self.process.communicate(timeout=60)
        lines = out.splitlines()
        made = [int(l.split()[1]) for l in lines if l.startswith("requests ")]
        assert made, out
        return made[0], [l for l in lines if not l.startswith("requests ")]


class Traffic(unittest.TestCase):
    def test_35_four_unmodified_services_talk_encrypted_and_a_stranger_is_refused(self):
        with mesh.namespace("bookinfo") as ns, mesh.namespace("outside", inject=False) as outside:
            deploy(ns, *shop(ns), deployment("client", ["sleep", "infinity"]))
            deploy(outside, deployment("stranger", ["sleep", "infinity"]),
                   deployment("plain", ["python3", "-m", "http.server", "8000"], port=8000))
            client, canary = pod_of(ns, "client"), "CANARY4bookinfo4strict"
            with mesh.capture() as seen:
                for _ in range(20):
                    page = json.loads(run_in(ns, client, "curl", "-sS", "-m", "10",
                                             f"http://productpage:9080/?echo={canary}"))
                    self.assertEqual(page["reviews"]["ratings"]["stars"], [5, 4])
                    self.assertEqual(page["details"]["pages"], 200)
                    self.assertEqual(page["echo"], canary)
                self.assertFalse(seen(canary), "no byte of it in the clear")
                # The capture can fail: the same words between two pods outside of the mesh are seen.
                run_in(outside, pod_of(outside, "stranger"), "curl", "-sS", "-m", "5",
                       f"http://plain:8000/?echo={canary}", check=False)
                self.assertTrue(seen(canary), "the capture sees what is in the clear")
            for target in (f"productpage.{ns}", mesh.pods(ns, "app=details")[0]["status"]["podIP"]):
                refused = run_in(outside, pod_of(outside, "stranger"), "curl", "-sS", "-m", "5",
                                 f"http://{target}:9080/", check=False)
                self.assertNotEqual(refused.returncode, 0)
                self.assertRegex(refused.stderr.lower(), "reset|couldn't connect")
            details = mesh.pods(ns, "app=details")[0]["metadata"]["name"]
            line = next(l for l in mesh.logs(ns, details, "countersign-proxy").splitlines()
                        if "this workload is strict" in l)
            self.assertIn("plaintext to port 9080 is refused", line, "and the sidecar says why")
            for pod in (p for name in SHOP for p in mesh.pods(ns, f"app={name}")):
                self.assertEqual(sum(c["restartCount"] for c in pod["status"]["containerStatuses"]), 0,
                                 "probes stay green")

    def test_probes_of_every_kind_work_under_strict_and_fail_when_the_app_does(self):
        with mesh.namespace("probes") as ns:
            app = "python3 -m http.server 8080 --directory /tmp & touch /tmp/ok; sleep infinity"
            probes = """readinessProbe: {httpGet: {path: /ok, port: 8080}, periodSeconds: 1, failureThreshold: 1}
          livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
          startupProbe: {httpGet: {path: /ok, port: 8080}, periodSeconds: 1, failureThreshold: 30}"""
            deploy(ns, deployment("web", ["bash", "-c", app], container=probes))
            ready = lambda: get("-n", ns, "pod", pod_of(ns, "web"))["status"]["containerStatuses"][0]["ready"]
            self.assertTrue(ready())
            run_in(ns, pod_of(ns, "web"), "python3", "-c", "import os; os.remove('/tmp/ok')")
            wait("the app to be not ready", lambda: not ready(), 20)

    def test_https_and_grpc_probes_and_hooks_work_under_strict(self):
        with mesh.namespace("probes-2") as ns, tempfile.TemporaryDirectory() as folder:
            sp.run("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout key -out crt"
                   " -subj /CN=app && cat key crt > both",
                   shell=True, check=True, cwd=folder, stderr=sp.DEVNULL)
            kubectl("-n", ns, "create", "configmap", "cert", f"--from-file={folder}/both")
            # Says which paths were asked for on its HTTPS port.
            app = ("import http.server as h, ssl\ns = h.HTTPServer(('', 8443), h.SimpleHTTPRequestHandler)\n"
                   "c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
                   "c.load_cert_chain('/cert/both')\ns.socket = c.wrap_socket(s.socket, server_side=True)\n"
                   "s.serve_forever()")
            volume = "volumes: [{name: cert, configMap: {name: cert}}]"
            get_ = lambda path: f"{{httpGet: {{path: {path}, port: 8443, scheme: HTTPS}}}}"
            container = f"""volumeMounts: [{{name: cert, mountPath: /cert}}]
          readinessProbe: {{httpGet: {{path: /tmp, port: 8443, scheme: HTTPS}}, periodSeconds: 1}}
          lifecycle: {{preStop: {get_("/etc/hostname")}}}"""
            web = deployment("web", ["python3", "-u", "-c", app], spec=volume, grace=10, container=container)
            # etcd serves gRPC's health protocol in the clear.
            etcd = ("/programs/etcd --data-dir=/tmp/etcd --listen-client-urls=http://0.0.0.0:2379"
                    " --advertise-client-urls=http://127.0.0.1:2379 & echo $! > /tmp/pid; wait")
            container = """volumeMounts: [{name: programs, mountPath: /programs, readOnly: true}]
          readinessProbe: {grpc: {port: 2379}, periodSeconds: 1}"""
            etcd = deployment("etcd", ["bash", "-c", etcd], container=container,
                              spec=f"volumes: [{{name: programs, hostPath: {{path: {binaries.build()}}}}}]")
            deploy(ns, web, etcd)
            pod = pod_of(ns, "web")
            follow = sp.Popen(cluster.kubectl_command("-n", ns, "logs", "-f", pod, "-c", "app"), stdout=sp.PIPE,
                              stderr=sp.STDOUT, text=True)
            mesh.delete_pods(ns, pod)
            said = follow.communicate(timeout=60)[0]
            self.assertIn("GET /tmp", said, "the HTTPS probe")
            self.assertIn("GET /etc/hostname", said, "the preStop hook")
            # And it is the app that is asked: an etcd that has stopped is not ready.
            run_in(ns, pod_of(ns, "etcd"), "bash", "-c", "kill -STOP $(cat /tmp/pid)")
            wait("etcd to be not ready",
                 lambda: not get("-n", ns, "pod", pod_of(ns, "etcd"))["status"]["containerStatuses"][0]["ready"], 20)
            run_in(ns, pod_of(ns, "etcd"), "bash", "-c", "kill -CONT $(cat /tmp/pid)")

    def test_a_job_completes(self):
        with mesh.namespace("jobs") as ns:
            deploy(ns, deployment("web", ["python3", "-m", "http.server", "8000"], port=8000))
            kubectl("-n", ns, "apply", "-f", "-", input=f"""
apiVersion: batch/v1
kind: Job
metadata: {{name: once}}
spec:
  backoffLimit: 2
  template:
    spec:
      restartPolicy: Never
      securityContext: {{runAsUser: 1000}}
      containers: [{{name: app, image: {images.BOX}, imagePullPolicy: Never,
                     args: [curl, -sSf, "http://web:8000/etc/hosts"]}}]
""")
            kubectl("-n", ns, "wait", "job/once", "--for=condition=Complete", "--timeout=90s")

    def test_a_rollout_under_constant_load_loses_no_request(self):
        with mesh.namespace("rollout") as ns:
            probe = """readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
          lifecycle: {preStop: {sleep: {seconds: 3}}}"""
            deploy(ns,
                   deployment("web",
                              ["bash", "-c", f"{mesh.NGINX} & trap 'nginx -c /tmp/n.conf -s quit' TERM; wait; wait"],
                              replicas=2, port=8080, container=probe, grace=20),
                   deployment("client", ["sleep", "infinity"]))
            load = Load(ns, pod_of(ns, "client"), "web", 8080)
            for _ in range(2):
                kubectl("-n", ns, "rollout", "restart", "deployment/web")
                kubectl("-n", ns, "rollout", "status", "deployment/web", "--timeout=90s")
            time.sleep(4)
            made, failed = load.end()
            self.assertEqual(failed, [])
            self.assertGreater(made, 200)

    def test_headless_selectorless_and_own_services(self):
        with mesh.namespace("services") as ns:
            stateful = deployment("db", ["python3", "-m", "http.server", "8000"], replicas=2, port=8000)
            stateful = stateful.replace("kind: Deployment", "kind: StatefulSet")
            stateful = stateful.replace("spec:\n  replicas", "spec:\n  serviceName: db\n  replicas", 1)
            stateful = stateful.replace("spec: {selector: {app: db}", "spec: {clusterIP: None, selector: {app: db}")
            deploy(ns, stateful, deployment("client", ["python3", "-m", "http.server", "8000"], port=8000))
            client = pod_of(ns, "client")
            fetch = lambda url: run_in(ns, client, "curl", "-sSf", "-m", "10", url)
            for name in ("db-0.db", "db-1.db", "db"):
                ask = ["curl", "-sSf", "-m", "10", f"http://{name}:8000/etc/hosts"]
                self.assertIn("127.0.0.1", wait(name, lambda: run_in(ns, client, *ask, check=False).stdout, 20))
            # A pod that calls itself through its own Service, and by its own address.
            self.assertIn("127.0.0.1", fetch("http://client:8000/etc/hosts"))
            own = get("-n", ns, "pod", client)["status"]["podIP"]
            self.assertIn("127.0.0.1", fetch(f"http://{own}:8000/etc/hosts"))
            # A Service without a selector whose endpoint, made by hand, is a meshed pod.
            target = get("-n", ns, "pod", "db-0")["status"]["podIP"]
            kubectl("-n", ns, "apply", "-f", "-", input=f"""
apiVersion: v1
kind: Service
metadata: {{name: by-hand}}
spec: {{ports: [{{name: tcp, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: by-hand-1, labels: {{kubernetes.io/service-name: by-hand}}}}
addressType: IPv4
ports: [{{name: tcp, port: 8000}}]
endpoints: [{{addresses: [{target}]}}]
""")
            by_hand = lambda: run_in(ns, client, "curl", "-sSf", "-m", "5", "http://by-hand/etc/hosts", check=False)
            self.assertIn("db-0",
                          wait("the Service by hand", lambda: (d := by_hand()).returncode == 0 and d.stdout, 20))

    def test_an_init_container_uses_the_mesh(self):
        with mesh.namespace("init") as ns:
            deploy(ns, deployment("web", ["python3", "-m", "http.server", "8000"], port=8000))
            init = (f"initContainers: [{{name: fetch, image: {images.BOX}, imagePullPolicy: Never,"
                    ' args: [curl, -sSf, "http://web:8000/etc/hosts"]}]')
            deploy(ns, deployment("late", ["sleep", "infinity"], spec=init))

    def test_redis_and_postgresql_as_pods(self):
        with mesh.namespace("databases") as ns:
            redis = ["redis-server", "--port", "6379", "--save", "", "--protected-mode", "no", "--dir", "/tmp"]
            postgres = ("initdb -D /tmp/db -U app -A trust >/dev/null"
                        " && echo 'host all all all trust' >> /tmp/db/pg_hba.conf"
                        " && exec postgres -D /tmp/db -h '*' -k /tmp")
            deploy(ns, deployment("redis", redis, port=6379,
                                  container="readinessProbe: {tcpSocket: {port: 6379}, periodSeconds: 1}"),
                   deployment("postgres", ["bash", "-c", postgres], port=5432,
                              container="readinessProbe: {tcpSocket: {port: 5432}, periodSeconds: 1}"),
                   deployment("client", ["sleep", "infinity"]))
            client = pod_of(ns, "client")
            self.assertEqual(run_in(ns, client, "redis-cli", "-h", "redis", "set", "k", "v").strip(), "OK")
            self.assertEqual(run_in(ns, client, "redis-cli", "-h", "redis", "get", "k").strip(), "v")
            run_in(ns, client, "redis-benchmark", "-h", "redis", "-n", "2000", "-c", "20", "-q", "-t", "set,get")
            psql = lambda sql: run_in(ns, client, "psql", "-h", "postgres", "-U", "app", "-d", "postgres", "-Atc",
                                      sql).strip()
            psql("create table t as select n, md5(n::text) m from generate_series(1, 100000) n")
            self.assertEqual(psql("select count(*), count(distinct m) from t"), "100000|100000")

    @mesh.alone
    def test_permissive_takes_a_stranger_and_strict_is_not_weakened_by_a_pod(self):
        with mesh.namespace("outside-2", inject=False) as outside, mesh.namespace("weak") as ns:
            deploy(outside, deployment("stranger", ["sleep", "infinity"]))
            web = deployment("web", ["python3", "-m", "http.server", "8000"], port=8000)
            deploy(ns, web.replace("metadata: {labels: {app: web}}",
                                   "metadata: {labels: {app: web}, annotations: {countersign.dev/mode: permissive}}"))
            call = lambda: run_in(outside, pod_of(outside, "stranger"), "curl", "-sS", "-m", "5",
                                  f"http://web.{ns}:8000/etc/hosts", check=False)
            self.assertNotEqual(call().returncode, 0, "the mesh is strict; a pod cannot be less")
            # The mesh's own mode is changed while it runs.
            kubectl("-n", mesh.NAMESPACE, "patch", "configmap", "countersign-mesh", "-p",
                    '{"data":{"mode":"permissive"}}')
            try:
                wait("the stranger to be let in", lambda: call().returncode == 0, 20)
            finally:
                kubectl("-n", mesh.NAMESPACE, "patch", "configmap", "countersign-mesh", "-p",
                        '{"data":{"mode":"strict"}}')
            wait("the stranger to be refused again", lambda: call().returncode != 0, 20)
