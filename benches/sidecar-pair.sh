#!/usr/bin/env bash
# Our sidecar as a peer of a side-by-side benchmark of sidecar pairs: one worker, fixed addresses, identities from files.
#   sidecar-pair.sh a|b LISTEN_IP LISTEN_PORT TARGET_IP TARGET_PORT PKIDIR
# a: plaintext in, mTLS out; b: the reverse. PKIDIR holds ca.crt and, for each side, SIDE.crt and SIDE.key.
set -euo pipefail
side=$1 listen=$2:$3 target=$4:$5 pki=$6
root=$(cd "$(dirname "$0")/.." && pwd)
host=$(rustc -vV | sed -n "s/^host: //p")
binary=${COUNTERSIGN:-${CARGO_TARGET_DIR:-$root/target}/$host/release/countersign}
[ -x "$binary" ] || { echo "build it first: images/build (looked for $binary)" >&2; exit 1; }
identity=(--svid "$pki/$side.crt" --key "$pki/$side.key" --bundle "bench.test=$pki/ca.crt" --log warn)
# As in an image and in `up`: crates/countersign/src/up/sidecar.rs says why.
export GLIBC_TUNABLES=glibc.cpu.x86_rep_movsb_threshold=0x10000000
case $side in
  a) exec "$binary" proxy "${identity[@]}" --outbound-listen "$listen" --outbound-target "$target" \
       --outbound-expect spiffe://bench.test/ns/default/sa/b ;;
  b) exec "$binary" proxy "${identity[@]}" --inbound-listen "$listen" --inbound-target "$target" ;;
  *) echo "the first argument is a or b" >&2; exit 2 ;;
esac
