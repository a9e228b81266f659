"""The chart's permissions against the API server's audit log: each is used, and none that is needed is missing."""
import dataclasses, json, unittest

import cluster, mesh
from mesh import NAMESPACE, deploy, get, kubectl, wait, web

PREFIX = f"system:serviceaccount:{NAMESPACE}:"
COUNTERSIGN = "app.kubernetes.io/name=countersign"


@dataclasses.dataclass(frozen=True)
class Right:
    """A verb on a kind of object that a service account has; in one namespace, and on one name, if given."""
    account: str
    verb: str
    group: str
    resource: str
    namespace: str = ""
    name: str = ""

    def covers(self, use):
        return ((self.account, self.verb, self.group, self.resource) == (use.account, use.verb, use.group, use.resource)
                and self.namespace in ("", use.namespace) and self.name in ("", use.name))

    def __str__(self):
        where = "".join(f" {what} {value}" for what, value in (("in", self.namespace), ("named", self.name)) if value)
        return f"{self.account}: {self.verb} {self.resource}.{self.group or 'core'}{where}"


def rights(binding, rules, namespace):
    """What a binding gives to service accounts of ours."""
    ours = [s["name"] for s in binding["subjects"] if s["kind"] == "ServiceAccount" and s["namespace"] == NAMESPACE]
    return {Right(account, verb, group, resource, namespace, name)
            for account in ours for rule in rules for group in rule["apiGroups"] for resource in rule["resources"]
            for verb in rule["verbs"] for name in rule.get("resourceNames", [""])}


def granted():
    """Every right of our service accounts, whichever role gives it."""
    found = set()
    for kind, role in (("clusterrolebindings", "clusterrole"), ("rolebindings", "role")):
        for binding in get("-A", kind)["items"]:
            if not any(s.get("namespace") == NAMESPACE for s in binding.get("subjects", [])):
                continue
            namespace = binding["metadata"].get("namespace", "")
            scope = ("-n", namespace) if binding["roleRef"]["kind"] == "Role" else ()
            rules = get(*scope, binding["roleRef"]["kind"], binding["roleRef"]["name"])["rules"]
            found |= rights(binding, rules, namespace)
    return found


def asked(*logs):
    """What our service accounts asked of the API server and of the kubelets, and whether they were let."""
    for line in (line for log in logs for line in log.read_text().splitlines()):
        # The last line may still be under way.
        if not line.endswith("}"):
            continue
        event = json.loads(line)
        user, what = event["user"]["username"], event.get("objectRef", {})
        if not user.startswith(PREFIX):
            review = event.get("requestObject", {}).get("spec", {})
            if review.get("user", "").startswith(PREFIX) and "resourceAttributes" in review:
                about = review["resourceAttributes"]
                resource = "/".join(filter(None, (about["resource"], about.get("subresource"))))
                yield Right(review["user"][len(PREFIX):], about["verb"], about.get("group", ""), resource,
                            about.get("namespace", ""), about.get("name", "")), None
            continue
        if not what.get("resource"):
            continue
        resource = "/".join(filter(None, (what["resource"], what.get("subresource"))))
        use = Right(user[len(PREFIX):], event["verb"], what.get("apiGroup", ""), resource, what.get("namespace", ""),
                    what.get("name", ""))
        code = event.get("responseStatus", {}).get("code")
        yield use, code != 403
        # An object that is applied and is not there yet needs the right to create it as well.
        if event["verb"] == "patch" and code == 201:
            yield dataclasses.replace(use, verb="create"), True


class Rbac(unittest.TestCase):
    def test_each_permission_is_used(self):
        # What happens seldom: the bundle is made anew, another registrar takes over, roles begin, pods come and go.
        with mesh.namespace("audited") as ns:
            deploy(ns, web())
            kubectl("-n", NAMESPACE, "delete", "configmap", "countersign-bundle")
            wait("the bundle", lambda: kubectl("-n", NAMESPACE, "get", "configmap", "countersign-bundle", check=False)
                 .returncode == 0, 30)
            kubectl("-n", NAMESPACE, "delete", "lease", "countersign-registrar")
            wait("a leader", lambda: kubectl("-n", NAMESPACE, "get", "lease", "countersign-registrar", check=False)
                 .returncode == 0, 60)
            mesh.delete_pods(NAMESPACE, "-l", COUNTERSIGN)
            mesh.ready()
            spiffeids = lambda: get("-n", ns, "spiffeids")["items"]
            wait("its identity", spiffeids, 30)
            # Another Service is another name in its certificate.
            kubectl("-n", ns, "expose", "deployment", "web", "--name=also", "--port=8080")
            wait("the name", lambda: any("also" in n for s in spiffeids() for n in s["spec"].get("dnsNames", [])), 30)
            kubectl("-n", ns, "delete", "deployment", "web", "--timeout=60s")
            wait("its identity to go", lambda: not spiffeids(), 60)
        have = granted()
        self.assertTrue(have)
        logs = sorted(cluster.STATE.parent.glob(f"countersign-cluster*/{cluster.AUDIT.name}"))
        self.assertIn(cluster.AUDIT, logs)
        unused = lambda: sorted(str(right) for right in have
                                if not any(let is not False and right.covers(use) for use, let in asked(*logs)))
        try:
            wait("every permission to be used", lambda: not unused(), 60)
        except AssertionError:
            self.fail(f"granted and not used: {unused()}")

    def test_nothing_that_is_needed_is_refused(self):
        have = granted()
        self.assertTrue(have)
        # What a test took away for a while is granted again.
        missing = {str(use) for use, let in asked(cluster.AUDIT)
                   if let is False and not any(right.covers(use) for right in have)}
        self.assertEqual(missing, set(), "refused, and not granted")
