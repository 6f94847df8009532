#!/bin/bash
# Builds the CPU image without Docker and runs the service in it, with what Debian 12 has: buildah and debootstrap.
#
#     apt-get install debootstrap buildah jq && deploy/docker/check_image.sh [FOLDER]
#
# As root, on Debian 12. What it makes lies in FOLDER (a new one under /tmp, 10 GB while it builds) and is deleted at the
# end, unless KEEP=yes. THREADS=1: of the engine, on a busy machine. MIRROR, PIP: debootstrap's mirror, the command for pip. The base image is made here under the name that the Dockerfile uses, with this machine's package
# sources and certificate authorities. pip asks the index that this machine's pip asks; torch's build for CPUs is
# downloaded by this machine's pip first, and only if that cannot have it, by the build from PyTorch's index.
#
# It stops at the first check that fails. Not checked, for want of an engine or a device: the CUDA image, Docker's own
# running of HEALTHCHECK, `docker compose up`.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/../.."

work=${1:-$(mktemp --directory /tmp/loraplex-image.XXXXXX)}
context=$work/context
base=$work/base
state=$work/state
pip=${PIP:-/usr/bin/python3 -m pip}
image=localhost/loraplex:cpu
export BUILDAH_ISOLATION=chroot
# A store of its own: this machine's images are neither used nor touched. vfs needs nothing of the kernel.
buildah() {
    command buildah --root "$work/storage" --runroot "$work/runroot" --storage-driver "${STORAGE_DRIVER:-vfs}" "$@"
}

started=$SECONDS
say() { printf '%4d s  %s\n' $((SECONDS - started)) "$*"; }
fail() { say "FAILED: $*" >&2; exit 1; }
megabytes() { du --summarize --apparent-size --one-file-system --block-size=1MB "$1" | cut -f1; }

outer=  # unshare, whose child is process 1 of the service's namespaces
tidy() {
    if [ -n "$outer" ]; then kill -KILL "$outer" 2>/dev/null || true; fi
    buildah rm --all >/dev/null 2>&1 || true
    [ "${KEEP:-no}" = yes ] || rm -rf "$work"
}
trap tidy EXIT
mkdir -p "$context" "$state/data" "$state/models"

# ---------------------------------------------------------------- the base image
name=$(sed -n 's/^ARG BASE=//p' Dockerfile)
unshare --mount debootstrap --variant=minbase --include=ca-certificates bookworm "$base" ${MIRROR:+"$MIRROR"} >"$work/debootstrap.log" \
    || { tail -5 "$work/debootstrap.log" >&2; fail "debootstrap"; }
if [ -e /etc/apt/sources.list.d/debian.sources ]; then
    cp /etc/apt/sources.list.d/debian.sources "$base/etc/apt/sources.list.d/"
    rm -f "$base/etc/apt/sources.list"
else
    cp /etc/apt/sources.list "$base/etc/apt/"
fi
apt-config dump Acquire >"$base/etc/apt/apt.conf.d/90as-outside"
cp -rL /usr/local/share/ca-certificates/. "$base/usr/local/share/ca-certificates/"
chroot "$base" update-ca-certificates >"$work/certificates.log" 2>&1
rm -rf "$base"/var/lib/apt/lists/* "$base"/var/cache/apt/*.bin "$base"/var/cache/apt/archives/*.deb
container=$(buildah from scratch)
buildah add --quiet "$container" "$base" / >/dev/null
buildah commit --quiet "$container" "docker.io/library/$name" >/dev/null
buildah rm "$container" >/dev/null
say "base image $name out of debootstrap: $(megabytes "$base") MB"
rm -rf "$base"

# ---------------------------------------------------------------- the image
git ls-files -z | tar --create --null --files-from=- | tar --extract --directory "$context"
cp -n deploy/docker/wheels/*.whl "$context/deploy/docker/wheels/" 2>/dev/null || true
arguments=(--build-arg "BAKE_MODEL=${BAKE_MODEL:-yes}")
torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements/cpu.txt)
if $pip download --quiet --no-deps --dest "$context/deploy/docker/wheels" "$torch" >"$work/pip.log" 2>&1; then
    arguments+=(--build-arg TORCH_INDEX=)
    say "$torch: from this machine's pip; the lock's hash decides whether it is taken"
fi
index=$($pip config get global.index-url 2>/dev/null || $pip config get :env:.index-url 2>/dev/null || true)
if [ -n "$index" ]; then arguments+=(--build-arg "PIP_INDEX_URL=$index"); fi
buildah bud --pull-never --target cpu --tag "$image" "${arguments[@]}" "$context" >"$work/build.log" 2>&1 \
    || { tail -20 "$work/build.log" >&2; fail "buildah bud"; }
container=$(buildah from --pull-never "$image")
root=$(buildah mount "$container")
size=$(megabytes "$root")
say "image built: $size MB unpacked, of it packages and model $(megabytes "$root/opt/loraplex") MB"

# ---------------------------------------------------------------- what is in it
buildah inspect --type image "$image" >"$work/image.json"
config() { jq --raw-output ".OCIv1.config | $1" "$work/image.json"; }
user=$(config .User)
uid=$(chroot "$root" id -u "$user")
[ "$uid" -ne 0 ] || fail "the image runs as root"
say "runs as $user, uid $uid"
[ "$(config '.Volumes | keys | join(" ")')" = "/data /models" ] || fail "volumes: $(config .Volumes)"
[ "$(config .StopSignal)" = SIGTERM ] || fail "stop signal: $(config .StopSignal)"

tools='gcc|g\+\+|cc|c\+\+|cpp|c[89]9|clang|clang\+\+|tcc|ld|ld\.(bfd|gold|lld)|as|make|cmake|ninja|rustc|cargo|go|nvcc|x86_64-linux-gnu-(gcc|g\+\+|cpp|ld|as).*'
found=$(find "$root" -xdev -regextype posix-extended -type f,l -perm /111 -regex ".*/($tools)(-[0-9.]+)?" -printf '/%P\n')
[ -z "$found" ] || fail "compilers or linkers: $found"
found=$(find "$root/usr/include" -name '*.h' 2>/dev/null | head -3)
[ -z "$found" ] || fail "headers of the C library: $found"
packages=$(chroot "$root" dpkg-query --show --showformat '${Package}\n')
found=$(grep -E '^(gcc|g\+\+|cpp|binutils|make|.*-dev|build-essential|python3-(pip|venv|setuptools|wheel))(-[0-9]+)?$' \
    <<<"$packages" || true)
[ -z "$found" ] || fail "packages for building: $found"
distributions=$(chroot "$root" /opt/loraplex/bin/python -m pip list --format=freeze --disable-pip-version-check)
# pip itself is meant to be there: it fetches the embedded model where that is not baked in. setuptools: torch needs it.
found=$(grep -iE '^(build|wheel|cython|ninja|cmake|scikit-build.*|meson.*|hatchling|flit.*|poetry.*|maturin|pytest|ruff|mypy)=' \
    <<<"$distributions" || true)
[ -z "$found" ] || fail "Python packages for building or testing: $found"
found=$(find "$root" -xdev \( -path "$root/proc" -o -path "$root/tmp" -o -path "$root/var/tmp" -o -path "$root/run/lock" \
    -o -path "$root/data" -o -path "$root/models" -o -path "$root/dev" \) -prune \
    -o \( -user "$uid" -o -perm /002 -not -type l \) -printf '/%P\n' | head -5)
[ -z "$found" ] || fail "the service's user could change: $found"
say "no compiler, linker or headers; $(wc -l <<<"$packages") Debian packages, $(wc -l <<<"$distributions") of Python," \
    "none for building but pip and setuptools; nothing that $user could change"
chroot "$root" /opt/loraplex/bin/python -m pip check >/dev/null || fail "pip check: packages do not fit each other"
sed -n 's/^\([a-z0-9._-]*\)==\([^ ]*\) .*/\1==\2/p' requirements/cpu.txt | sort >"$work/locked"
tr 'A-Z_' 'a-z-' <<<"$distributions" | grep -v '^loraplex[= ]' | sort >"$work/installed"
diff "$work/locked" "$work/installed" >"$work/diff" || fail "not what requirements/cpu.txt pins: $(head -5 "$work/diff")"
say "every Python package is the one that requirements/cpu.txt pins"

# ---------------------------------------------------------------- running it
chown "$uid:$uid" "$state"/*
# As Compose runs it: read-only but for /data, /models and /tmp, no capability, processes and network of its own (so its
# port is nobody else's). Without a network beyond itself it has to do with what is in the image.
mapfile -t environment < <(config '.Env[]')
environment+=(LORAPLEX_ALLOW_PUBLIC=true NO_COLOR=1 ${THREADS:+LORAPLEX_THREADS=$THREADS})
mapfile -t command < <(config '(.Entrypoint + .Cmd)[]')
as_user=(env --ignore-environment "${environment[@]}" chroot "$root" setpriv --reuid "$uid" --regid "$uid" --clear-groups
    --no-new-privs --bounding-set=-all --inh-caps=-all --)
inside() { nsenter --target "$outer" --mount --net --pid="/proc/$outer/ns/pid_for_children" "${as_user[@]}" "$@"; }
start() {
    unshare --mount --net --pid --fork --kill-child bash -euc '
        root=$1 state=$2; shift 2
        mount --make-rprivate /
        mount --bind "$root" "$root"
        mount --options remount,bind,ro "$root"
        mount --types proc proc "$root/proc"
        mount --types tmpfs --options mode=1777 tmpfs "$root/tmp"
        mount --rbind /dev "$root/dev"
        mount --bind "$state/data" "$root/data"
        mount --bind "$state/models" "$root/models"
        ip link set lo up
        exec "$@"' start "$root" "$state" "${as_user[@]}" "${command[@]}" >>"$work/service.log" 2>&1 &
    outer=$!
}
python() { inside /opt/loraplex/bin/python -c "$@"; }
status() { python '
import sys, urllib.request, urllib.error
try:
    print(urllib.request.urlopen("http://127.0.0.1:8000" + sys.argv[1], timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print("none")' "$1"; }
ready() {
    for _ in $(seq 600); do
        kill -0 "$outer" 2>/dev/null || { tail -20 "$work/service.log" >&2; fail "the service ended"; }
        [ "$(status /ready)" != 200 ] || return 0
        sleep 1
    done
    fail "not ready after 600 tries, a second and more each"
}
stop() {
    local begin=$SECONDS code=0
    pkill --signal "$(config .StopSignal)" --parent "$outer"  # process 1 in there
    wait "$outer" || code=$?
    outer=
    [ "$code" -eq 0 ] || { tail -20 "$work/service.log" >&2; fail "SIGTERM: exit code $code"; }
    say "SIGTERM: ended with exit code 0 after $((SECONDS - begin)) s"
}

start
ready
inside loraplex-healthcheck || fail "the health check fails while the service is ready"
said=$(inside env LORAPLEX_PORT=1 loraplex-healthcheck 2>&1) && fail "the health check succeeds where nothing listens"
grep -q refused <<<"$said" || fail "the health check: $said"
say "ready; the health check succeeds, and fails where nothing listens"
running=$(inside sh -c 'for p in /proc/[0-9]*; do sed -n "s/^Uid:\t\([0-9]*\).*/\1/p" $p/status; done' | sort | uniq -c)
say "processes by uid:" $running
if inside touch /opt/loraplex/x 2>/dev/null; then fail "the service's user can write into the image"; fi
example=$(inside sh -c 'ls -d /opt/loraplex/lib/python3*/site-packages/examples/adapters/pirate')
inside loraplex upload check "$example" >/dev/null || fail "upload"
answer=$(inside loraplex run check "What is a lighthouse?" --max-tokens 16 --temperature 0)
[ -n "$answer" ] || fail "no answer"
say "an uploaded adapter answers: $answer"
stop
if [ "${AGAIN:-yes}" = yes ]; then
    start
    ready
    again=$(inside loraplex run check "What is a lighthouse?" --max-tokens 16 --temperature 0)
    [ "$again" = "$answer" ] || fail "a second container on the same volumes answers: $again"
    say "a second container on the same volumes gives the same answer"
    stop
fi
buildah umount "$container" >/dev/null
say "all checked: $size MB"
