#!/usr/bin/env bash
# bench/on_gpu.sh [--rehearse] [--wheels DIR] [--from DIR] STAGE OUT
# bench/on_gpu.sh --list
#
# What a GPU can say about this checkout, in stages by worth, each ended within nine minutes:
#   truth     the environment; headline shapes against float64, then timed beside the originals,
#             torch.compile of them, torch's copy and matmul, and the predictions
#   tests     the tests that need a GPU, those of the Triton kernels, and the whole self-check
#   tune      neighbours of the kernels' launch choices, timed (bench/tune.py)
#   sanitize  compute-sanitizer on the Triton and CUDA kernels, at small shapes
#   report    curves to 1,048,576 steps, models' training steps, other packages' kernels
#   counters  hardware counters of the headline kernels, by ncu
# --list has the steps with their limits in seconds: estimates, as no GPU has run any yet. A step
# that fails stops no other; the last lines and the exit status tell. OUT gets STAGE.tar.gz, written
# after every step, and cache.tar.gz.*, the compiled kernels. The same command again leaves out the
# steps that have passed; on a fresh machine --from DIR, where an earlier OUT lies, goes on from
# there. Until they are packed, files are in $WORK (/tmp/fastmix-on-gpu). Wheels in DIR, of the
# originals and of other packages, are put on the path; what is absent is named and left out.
# --rehearse takes the same steps without a GPU, with tiny shapes, interpreted kernels, compilers that
# do not optimise and twenty seconds to measure in: roads are tried, nothing is timed.
# PYTHON names the interpreter: python3.
set -uo pipefail
cd "$(dirname "$0")/.."
all_stages=(truth tests tune sanitize report counters)
python=${PYTHON:-python3} rehearse='' list='' wheels='' from=''
usage() { sed -n '2,23s/^# \?//p' bench/on_gpu.sh >&2; exit 2; }

while [ $# -gt 0 ]; do
    case $1 in
        --rehearse) rehearse=1 ;;
        --list) list=1 ;;
        --wheels | --from)
            [ -d "${2:-}" ] || { echo "$1 needs a folder that is there, got '${2:-}'" >&2; exit 2; }
            printf -v "${1#--}" %s "$(cd "$2" && pwd)"
            shift ;;
        *) break ;;
    esac
    shift
done
failed=() began_stage=$SECONDS

# ---- steps, archives

step() {  # name, seconds it may take, command …
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    [ "$list" ] && { echo "$stage $name $limit"; return; }
    printf '%-28s' "$name"
    [ -e "$results/$name.done" ] && { echo "passed before"; return; }
    # Interpreted kernels are slow, and so are two cores. A report that is interrupted writes what
    # there is.
    timeout -s INT -k 10 $((rehearse ? 8 * limit : limit)) "$@" > "$results/$name.txt" 2>&1
    status=$?
    if [ $status = 0 ]; then
        touch "$results/$name.done"
        echo "ok, $((SECONDS - began)) s: $(tail -n 1 "$results/$name.txt" | cut -c 1-160)"
    else
        echo "FAILED ($status), $((SECONDS - began)) s; the end of $name.txt:"
        tail -n 12 "$results/$name.txt" | cut -c 1-300 | sed 's/^/    /'
        failed+=("$name")
    fi
    tar -cz -C "$work/$stage" -f "$work/$stage.part" "$(basename "$results")" &&
        mv "$work/$stage.part" "$out/$stage.tar.gz"
}

pack_cache() {  # what is needed to run the kernels again: not their intermediate code
    [ "$list" ] && return
    rm -f "$out"/cache.tar.gz.*
    (cd "$cache" && find . -path ./inductor -prune -o -type f \
        \( -name '*.json' -o -name '*.cubin' -o -name '*.so' -o -name '*.sha256' \) -print0) |
        tar -cz -C "$cache" --null -T - | split -b 15M - "$out/cache.tar.gz."
    local parts=("$out"/cache.tar.gz.*)
    [ ${#parts[@]} -le 6 ] || { rm -f "${parts[@]}"; echo "the cache is too large to be kept"; }
}

prepare() {
    mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
    work=${WORK:-/tmp/fastmix-on-gpu} cache=${WORK:-/tmp/fastmix-on-gpu}/cache
    # What has passed has passed for these sources.
    local sources
    sources=$(find bench csrc fastmix kernels tests -name __pycache__ -prune -o -type f -print0 |
        sort -z | xargs -0 cat | sha1sum | cut -c 1-12)
    results=$work/$stage/${rehearse:+rehearsed-}$sources
    if [ -e "$from/$stage.tar.gz" ] && [ ! -e "$work/$stage" ]; then
        mkdir -p "$work/$stage" && tar -xz -C "$work/$stage" -f "$from/$stage.tar.gz"
    fi
    if compgen -G "$from/cache.tar.gz.*" > /dev/null && [ ! -e "$cache" ]; then
        mkdir -p "$cache" && cat "$from"/cache.tar.gz.* | tar -xz -C "$cache"
    fi
    mkdir -p "$results" "$cache" "$work/site"
    for wheel in ${wheels:+"$wheels"/*.whl}; do
        "$python" -m zipfile -e "$wheel" "$work/site"
    done
    export PYTHONPATH=$PWD:$PWD/tests:$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
    export TRITON_CACHE_DIR=$cache/triton FASTMIX_CACHE=$cache/fastmix
    export TORCHINDUCTOR_CACHE_DIR=$cache/inductor MPLCONFIGDIR=$work/matplotlib
    if [ "$rehearse" ]; then
        export TRITON_INTERPRET=1 CXXFLAGS=-O0 FASTMIX_INSTRUCTION_SETS=portable
    else
        "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
            echo "torch finds no GPU here; --rehearse tries the steps without one" >&2; exit 2; }
    fi
    "$python" - <<'PROGRAM'
import importlib.util
absent = [name for name in (
    "gateloop_transformer", "metaformer_gpt", "gated_state_spaces_pytorch", "g_mlp_gpt",
    "accelerated_scan", "fla", "matplotlib") if importlib.util.find_spec(name) is None]
print("not installed, so left out:", ", ".join(absent) or "nothing")
PROGRAM
}

# ---- what steps run

cores=$(nproc)
jobs=$((cores < 16 ? cores : 16))
device=${rehearse:+cpu}
device=${device:-cuda}
minutes() { awk -v s="$1" 'BEGIN { printf "%.2f", (s - 5) / 60 }'; }  # what would not end is left out
to_measure() { minutes $((rehearse && $1 > 25 ? 25 : $1)); }

report() {  # name, seconds, implementation or '', dtype, batch, steps, width, heads, more …
    local name=$1 limit=$2 impl=$3 dtype=$4 b=$5 n=$6 dim=$7 heads=$8
    shift 8
    [ "$rehearse" ] && b=1 n=40 dim=16 heads=4 dtype=float32  # the interpreter truncates
    step "$name" "$limit" "$python" bench/run.py --device "$device" --dtype "$dtype" \
        --batch "$b" --seq "$n" --dim "$dim" --heads "$heads" ${impl:+--impl "$impl"} \
        --minutes "$(to_measure "$limit")" --json "$results/$name.json" --csv "$results/$name.csv" "$@"
}

operators() {  # name, seconds, dtype, batch, steps, width, heads, operators …
    local name=$1 limit=$2 dtype=$3 b=$4 n=$5 dim=$6 heads=$7
    shift 7
    report "$name" "$limit" triton "$dtype" "$b" "$n" "$dim" "$heads" --models none --ops "$@"
}

compile() {  # name, seconds, cases …: on all cores, before anything is timed
    local name=$1 limit=$2
    shift 2
    [ "$rehearse" ] && set -- --target sm90 --only "cumulative_mean bfloat16"
    step "$name" "$limit" env TRITON_INTERPRET=0 "$python" bench/ahead.py --jobs "$jobs" "$@"
    pack_cache
}

self_check() {  # name, seconds, processes, cases …
    local name=$1 limit=$2 processes=$3
    shift 3
    [ "$rehearse" ] && processes=2 && set -- --only float32
    step "$name" "$limit" "$python" bench/self_check.py --device "$device" --jobs "$processes" \
        --minutes "$(to_measure "$limit")" --json "$results/$name.jsonl" "$@"
}

kernels() {  # ten tests to a process, on all cores: compiling is what takes time
    set -o pipefail
    # What is chosen, here all, runs whole; a rehearsal takes the first test of each file.
    "$python" -m pytest --collect-only -q -p no:cacheprovider $every tests/triton tests/test_gpu.py |
        grep :: | shuf |
        xargs -r -d '\n' -n 10 -P "$jobs" "$python" -m pytest -q -p no:cacheprovider
}

gpu_tests() {  # the others, without those of a module whose original is not here
    local files=() said
    for file in $(grep -lE 'mark\.gpu' tests/*.py | grep -v test_gpu.py); do
        if said=$("$python" -m pytest --collect-only -q -p no:cacheprovider -m gpu "$file" 2>&1) ||
                ! grep -q "ModuleNotFoundError: No module named" <<< "$said"; then
            files+=("$file")
        else
            echo "left out: $file, $(grep -om 1 'No module named .*' <<< "$said")"
        fi
    done
    "$python" -m pytest -q -p no:cacheprovider -m gpu "${files[@]}"
}
export -f kernels gpu_tests
every=$([ "$rehearse" ] || echo "-k test_")
export python jobs every

tool() {  # name, seconds, the tool and its flags, --, command …: a rehearsal can do without it
    local name=$1 limit=$2 with=()
    shift 2
    while [ "$1" != -- ]; do with+=("$1"); shift; done
    shift
    if [ ! "$list" ] && ! command -v "${with[0]}" > /dev/null; then
        [ "$rehearse" ] || { echo "$name left out: there is no ${with[0]} here"; return; }
        with=()
    fi
    step "$name" "$limit" "${with[@]}" "$@"
}

# ---- the stages

truth() {
    step env 20 "$python" -m fastmix.env --quick
    compile compile 140 --headline
    self_check self-check 60 4 --headline
    operators scans      70 bfloat16 8 4096  1024 16 gate_loop linear_scan
    operators mixers     60 bfloat16 8 8192  512  8  decay_conv windowed_sgu cumulative_mean
    operators scans-long 40 bfloat16 1 65536 1024 1024 gate_loop
    step library 100 "$python" -c "from fastmix.native import library
print(library.load('${rehearse:+cpu}' or 'cuda'))"
    report fft-conv 35 native bfloat16 8 8192 512 8 --models none --ops fft_conv
    step predictions 10 "$python" bench/predictions.py --beside "$results"/*.json
    [ "$list" ] || cat "$results/predictions.txt"
}

tests() {
    step tests-gpu 60 bash -c gpu_tests
    step kernels 110 bash -c kernels
    compile compile-all 190 --long
    self_check self-check-all 170 12 --long
}

tune() {
    local found=$results/candidates.json of=() how=()
    [ "$rehearse" ] && of=(--target sm90 --only "cumulative_mean 1x260x15 float32 sliced=True")
    [ "$rehearse" ] && how=(--made-up)
    step candidates 240 env TRITON_INTERPRET=0 "$python" bench/tune.py --candidates "$found" \
        --jobs "$jobs" --minutes "$(minutes 190)" "${of[@]}"
    step tune 290 "$python" bench/tune.py --time "$found" --out "$results" --device "$device" \
        --minutes "$(minutes 270)" "${how[@]}"
    [ "$list" ] || cat "$results/tune.txt"
}

sanitize() {
    local only=bfloat16
    local lengths='on_a_gpu and (257- or 4097- or 8193- or 16385-) and dtype0'
    [ "$rehearse" ] && only='cumulative_mean float32'
    # Torch's caching allocator would hide what lies beyond a tensor's end.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local tools=(memcheck racecheck initcheck synccheck)
    [ "$rehearse" ] && tools=(memcheck)  # without the tool they are all the same
    for which in "${tools[@]}"; do
        tool "triton-$which" 85 compute-sanitizer --tool "$which" --error-exitcode 1 -- \
            "$python" bench/self_check.py --device "$device" --jobs 4 --only "$only"
        tool "fft-conv-$which" 45 compute-sanitizer --tool "$which" --error-exitcode 1 -- \
            "$python" -m pytest -q -p no:cacheprovider tests/test_fft_conv_cuda.py -k "$lengths"
    done
}

report_all() {
    local plot=(--plot "$results/curves.png")
    "$python" -c 'import matplotlib' 2> /dev/null || plot=()
    local scan=(gate_loop) three=(gate_loop decay_conv windowed_sgu)
    local all=(linear_scan "${three[@]}" cumulative_mean)
    # However short the time, every row is measured; interpreted, each takes a minute, as in truth.
    [ "$rehearse" ] && scan=(cumulative_mean) three=(cumulative_mean) all=(cumulative_mean)
    operators scans-8192 30 bfloat16 8 8192 1024 8 "${scan[@]}"
    operators float32    40 float32  8 4096 1024 16 "${three[@]}"
    operators curves    180 bfloat16 1 1048576 512 8 "${all[@]}" "${plot[@]}"
    report fft-conv-long 30 native bfloat16 1 1048576 512 8 --models none --ops fft_conv
    report models       160 '' bfloat16 8 4096 1024 16 --ops none --generate 0
    local shape=(--batch 8 --seq 4096 --dim 1024)
    [ "$rehearse" ] && shape=(--batch 1 --seq 40 --dim 16)
    for heads in 16 8; do
        step "peers-$heads-heads" 40 "$python" bench/peers.py --device "$device" "${shape[@]}" \
            --heads "$heads" --json "$results/peers-$heads-heads.json"
    done
}

counters() {
    for operator in gate_loop linear_scan windowed_sgu decay_conv cumulative_mean; do
        local which=(--headline --only "$operator")
        [ "$rehearse" ] && which=(--only "$operator float32" --minutes 0.05)
        # Our kernels' names begin with an underscore, torch's do not.
        tool "ncu-$operator" 100 ncu --clock-control none --target-processes all --csv \
            --kernel-name-base function --kernel-name 'regex:^_' --launch-count 40 \
            --section SpeedOfLight --section Occupancy --section WarpStateStats \
            --section MemoryWorkloadAnalysis -- \
            "$python" bench/self_check.py --device "$device" --jobs 1 "${which[@]}"
    done
}

run_stage() { if [ "$1" = report ]; then report_all; else "$1"; fi; }

if [ "$list" ]; then
    results='' out=''
    for stage in "${all_stages[@]}"; do run_stage "$stage"; done
    exit
fi
stage=${1:-}
[ $# = 2 ] && [[ " ${all_stages[*]} " = *" $stage "* ]] || usage
prepare "$2"
run_stage "$stage"
pack_cache
if [ ${#failed[@]} = 0 ]; then
    echo "all steps passed, after $((SECONDS - began_stage)) s; results are in $out/$stage.tar.gz"
else
    echo "failed, after $((SECONDS - began_stage)) s: ${failed[*]}"
    exit 1
fi
