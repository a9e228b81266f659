//! Bytes, ends and resets arrive as they left, whichever side they come from.

use std::path::Path;

use crate::support::{Mesh, able};

/// A mesh with one Python server, and a client script run in it; the client's output.
fn talk(test: &str, server: &str, client: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, script: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("{PRELUDE}\n{script}")).unwrap();
        path.display().to_string()
    };
    crate::support::sh(&format!("chmod 755 {}", folder.path().display()));
    let (server, client) = (write("server.py", server), write("client.py", client));
    let mesh =
        Mesh::up(test, &format!("  - name: server\n    ports: [7000]\n    command: [/usr/bin/python3, {server}]\n"));
    mesh.wait_for_port("server", 7000);
    let said = mesh.run("client", &["/usr/bin/python3", &client]);
    let log = mesh.log("server");
    mesh.down();
    format!("{said}{log}")
}

const PRELUDE: &str = r"
import hashlib, os, resource, socket, struct, sys, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
def listen(backlog=1024):
    s = socket.create_server(('', 7000), backlog=backlog)
    return s
def dial():
    return socket.create_connection(('server', 7000))
def read_all(c):
    h = hashlib.sha256(); n = 0
    while True:
        b = c.recv(65536)
        if not b: return h.hexdigest(), n
        h.update(b); n += len(b)
def reset(c):
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); c.close()
def say(*words):
    print(*words, flush=True)
";

fn python(test: &str, server: &str, client: &str) -> Option<String> {
    able(&["python3"]).then(|| talk(test, server, client))
}

#[test]
fn a_client_that_has_said_its_last_word_still_hears_the_answer() {
    let server = "s = listen()\nwhile True:\n c, _ = s.accept()\n d, n = read_all(c)\n time.sleep(1)\n c.sendall(f'{n} {d}'.encode()); c.close()";
    let client = "c = dial(); data = os.urandom(1000000); c.sendall(data); c.shutdown(socket.SHUT_WR)\nanswer = b''\nwhile True:\n b = c.recv(1000)\n if not b: break\n answer += b\nassert answer.decode() == f'1000000 {hashlib.sha256(data).hexdigest()}', answer\nsay('heard')";
    if let Some(said) = python("half-client", server, client) {
        assert!(said.contains("heard"), "{said}");
    }
}

#[test]
fn a_server_that_has_said_its_last_word_still_hears_the_client() {
    let server = "s = listen()\nwhile True:\n c, _ = s.accept()\n c.sendall(b'hello'); c.shutdown(socket.SHUT_WR)\n say('server got', *read_all(c)); c.close()";
    let client = "c = dial()\nassert read_all(c)[1] == 5\ndata = b'x' * 3000000\nc.sendall(data); c.shutdown(socket.SHUT_WR); time.sleep(1)\nsay('sent', hashlib.sha256(data).hexdigest())";
    if let Some(said) = python("half-server", server, client) {
        let sum = said.split("sent ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
        assert!(said.contains(&format!("server got {sum} 3000000")), "{said}");
    }
}

#[test]
fn netcat_half_closes_in_both_directions() {
    if !able(&["nc"]) {
        return;
    }
    // `nc -N` shuts its writing side down at the end of its input and goes on to listen.
    let serve = "while true; do echo from the server | nc -N -l 7000 >> $OUT; done";
    let folder = tempfile::tempdir().unwrap();
    crate::support::sh(&format!("chmod 777 {}", folder.path().display()));
    let out = folder.path().join("out");
    let mesh = Mesh::up(
        "nc",
        &format!(
            "  - name: server\n    ports: [7000]\n    env: {{OUT: {}}}\n    command: [sh, -c, '{serve}']\n",
            out.display()
        ),
    );
    mesh.wait_for_port("server", 7000);
    let heard = mesh.shell("client", "echo from the client | nc -N server 7000");
    assert_eq!(heard, "from the server\n");
    crate::support::wait_for("the server to hear", std::time::Duration::from_secs(10), || {
        std::fs::read_to_string(&out).is_ok_and(|t| t.contains("from the client\n")).then_some(())
    });
    mesh.down();
}

#[test]
fn a_hundred_megabytes_go_up_and_down_at_once() {
    let both = "
def both(c, seed):
    block = hashlib.sha256(seed).digest() * 32768
    h = hashlib.sha256()
    def send():
        for _ in range(100): c.sendall(block); h.update(block)
        c.shutdown(socket.SHUT_WR)
    t = threading.Thread(target=send); t.start()
    got, n = read_all(c); t.join()
    return h.hexdigest(), got, n
";
    let server = format!(
        "{both}\ns = listen()\nwhile True:\n c, _ = s.accept()\n sent, got, n = both(c, b'server')\n say('server', sent, got, n); c.close()"
    );
    let client =
        format!("{both}\nc = dial()\nsent, got, n = both(c, b'client')\nsay('client', sent, got, n); time.sleep(1)");
    if let Some(said) = python("updown", &server, &client) {
        let line = |who: &str| {
            said.lines()
                .find(|l| l.starts_with(who))
                .unwrap_or_else(|| panic!("{said}"))
                .split(' ')
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let (server, client) = (line("server"), line("client"));
        assert_eq!((&server[1], &server[2]), (&client[2], &client[1]), "each got what the other sent");
        assert_eq!((server[3].as_str(), client[3].as_str()), ("104857600", "104857600"));
    }
}

#[test]
fn a_thousand_connections_live_at_once() {
    let server = "
import selectors
s = listen(); sel = selectors.DefaultSelector(); sel.register(s, selectors.EVENT_READ)
while True:
    for key, _ in sel.select():
        if key.fileobj is s:
            c, _ = s.accept(); sel.register(c, selectors.EVENT_READ)
        else:
            b = key.fileobj.recv(100)
            if b: key.fileobj.sendall(b)
            else: sel.unregister(key.fileobj); key.fileobj.close()
";
    let client = "
all = []
for i in range(1000):
    c = dial(); c.sendall(f'{i:04}'.encode()); all.append(c)
for i, c in enumerate(all):
    assert c.recv(4) == f'{i:04}'.encode(), i
for i, c in enumerate(reversed(all)):
    c.sendall(f'{i:04}'.encode())
for i, c in enumerate(reversed(all)):
    assert c.recv(4) == f'{i:04}'.encode(), i
say('all', len(all))
";
    if let Some(said) = python("thousand", server, client) {
        assert!(said.contains("all 1000"), "{said}");
    }
}

#[test]
fn a_reset_by_the_server_is_a_reset_at_the_client() {
    let server =
        "s = listen()\nwhile True:\n c, _ = s.accept()\n c.recv(10); c.sendall(b'part'); time.sleep(0.3); reset(c)";
    let client = "c = dial(); c.sendall(b'hello')\nassert c.recv(4) == b'part'\ntry:\n b = c.recv(1); say('clean end', b)\nexcept ConnectionResetError: say('reset')";
    if let Some(said) = python("reset-server", server, client) {
        assert!(said.contains("reset"), "{said}");
    }
}

#[test]
fn a_reset_by_the_client_is_a_reset_at_the_server() {
    let server = "s = listen()\nwhile True:\n c, _ = s.accept()\n try:\n  say('server read', read_all(c)[1])\n except ConnectionResetError: say('server saw a reset')";
    let client = "c = dial(); c.sendall(b'hello'); time.sleep(0.5); reset(c); time.sleep(1)";
    if let Some(said) = python("reset-client", server, client) {
        assert!(said.contains("server saw a reset"), "{said}");
    }
}

#[test]
fn a_sidecar_that_is_killed_looks_like_a_reset_never_like_an_end() {
    if !able(&["python3"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    crate::support::sh(&format!("chmod 755 {}", folder.path().display()));
    let write = |name: &str, script: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("{PRELUDE}\n{script}")).unwrap();
        path.display().to_string()
    };
    let server = write(
        "server.py",
        "s = listen()\nwhile True:\n c, _ = s.accept()\n c.sendall(b'part')\n try: say('server end', read_all(c))\n except ConnectionResetError: say('server reset')",
    );
    let client = write(
        "client.py",
        "c = dial(); assert c.recv(4) == b'part'; open(sys.argv[1], 'w').close()\ntry: say('clean end', c.recv(1))\nexcept ConnectionResetError: say('reset')",
    );
    let mesh = Mesh::up(
        "cut-sidecar",
        &format!("  - name: server\n    ports: [7000]\n    command: [/usr/bin/python3, {server}]\n"),
    );
    mesh.wait_for_port("server", 7000);
    let flag = mesh.folder().join("connected");
    crate::support::sh(&format!("chmod 777 {}", mesh.folder().display()));
    let child = mesh
        .join("client", &[], &["/usr/bin/python3", &client, &flag.display().to_string()])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    crate::support::wait_for("the client to connect", std::time::Duration::from_secs(20), || {
        Path::new(&flag).exists().then_some(())
    });
    // The server's sidecar dies: nobody announces the end of the TLS stream.
    let pid = mesh.process("sidecars/server/admin.sock");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "reset\n");
    crate::support::wait_for("the server to see it", std::time::Duration::from_secs(10), || {
        mesh.log("server").contains("server reset").then_some(())
    });
    let log =
        crate::support::wait_for("the client's sidecar to say how it ended", std::time::Duration::from_secs(5), || {
            std::fs::read_to_string(mesh.folder().join("logs/client.sidecar.log")).ok()
        });
    assert!(!log.contains("panic"), "{log}");
    mesh.down();
}

/// Sends uploads of three sizes, a hundred times each, to a server that answers early and closes; says how many answers were
/// heard whole. Without a sidecar all of them are.
const UPLOADS: &str = r"
for size in (100000, 1000000, 5000000):
    heard = 0
    for _ in range(100):
        c = dial(); got = b''
        try: c.sendall(b'POST / HTTP/1.1\r\nHost: server\r\nContent-Length: %d\r\n\r\n' % size + b'x' * size)
        except OSError: pass
        try:
            while True:
                b = c.recv(65536)
                if not b: break
                got += b
        except OSError: pass
        head, _, body = got.partition(b'\r\n\r\n')
        length = [int(l.split(b':')[1]) for l in head.lower().split(b'\r\n') if l.startswith(b'content-length')]
        heard += b' 413 ' in head and length == [len(body)]
        c.close()
    say('heard', size, heard)
";

fn all_are_heard(said: &str) {
    for size in [100_000, 1_000_000, 5_000_000] {
        assert!(said.contains(&format!("heard {size} 100\n")), "{said}");
    }
}

#[test]
fn an_early_answer_to_an_upload_is_heard_each_time() {
    let server = "
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(1000)
        body = b'too much of it ' * 100
        self.send_response(413); self.send_header('Content-Length', str(len(body))); self.end_headers()
        self.wfile.write(body); self.close_connection = True
    def log_message(self, *words): pass
ThreadingHTTPServer(('', 7000), Handler).serve_forever()
";
    if let Some(said) = python("early-answer", server, UPLOADS) {
        all_are_heard(&said);
    }
}

#[test]
fn nginx_is_heard_when_it_refuses_an_upload() {
    if !able(&["python3", "nginx"]) {
        return;
    }
    let nginx = crate::support::path_of("nginx");
    let server = format!(
        "
conf = '''daemon off; worker_processes 1; error_log stderr crit; pid /tmp/nginx-PID.pid;
events {{}}
http {{
  access_log off;
  client_body_temp_path /tmp/nginx-PID-b; proxy_temp_path /tmp/nginx-PID-p; fastcgi_temp_path /tmp/nginx-PID-f;
  uwsgi_temp_path /tmp/nginx-PID-u; scgi_temp_path /tmp/nginx-PID-s;
  server {{ listen 7000; client_max_body_size 10k; location / {{ return 200; }} }}
}}'''.replace('PID', str(os.getpid()))
path = '/tmp/nginx-%d.conf' % os.getpid()
open(path, 'w').write(conf)
os.execv('{nginx}', ['{nginx}', '-e', 'stderr', '-c', path])
"
    );
    all_are_heard(&talk("early-nginx", &server, UPLOADS));
}
