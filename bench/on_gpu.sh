#!/usr/bin/env bash
# bench/on_gpu.sh OUT          all that a GPU can say about this checkout, into the folder OUT:
#                              tests, then the report at the shapes of the README, and other
#                              packages' kernels where they are installed. With 12 cores to
#                              compile on the steps are stopped before nine minutes are over,
#                              and should take seven: an estimate, as no GPU has run them yet.
#                              Up to three more where compute-sanitizer is.
# bench/on_gpu.sh --rehearse OUT   the same steps with tiny shapes and interpreted kernels, on
#                              a machine without a GPU: ten minutes on two cores, if all theirs.
# A step that fails does not stop the others; the last lines and the exit status tell.
set -uo pipefail
cd "$(dirname "$0")/.."
rehearse=
[ "${1:-}" = --rehearse ] && { rehearse=1; shift; }
[ $# = 1 ] || { sed -n '2,11s/^# //p' "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
failed=()
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}

if [ "$rehearse" ]; then
    export TRITON_INTERPRET=1
    device=cpu reach= shape="--batch 1 --seq 40 --dim 16"
else
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "torch finds no GPU here; --rehearse tries the steps without one" >&2; exit 2; }
    device=cuda reach="--long" shape="--batch 8 --seq 4096 --dim 1024"
fi

step() {  # name, seconds it may take, command …
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    [ "$rehearse" ] && limit=$((4 * limit))  # interpreted kernels are slow
    printf '%-28s' "$name"
    if timeout "$limit" "$@" > "$out/$name.txt" 2>&1; then
        echo "ok, $((SECONDS - began)) s"
    else
        echo "FAILED ($?), $((SECONDS - began)) s: $out/$name.txt"
        failed+=("$name")
    fi
}

plots=1
python -c 'import matplotlib' 2> /dev/null || { plots=; echo "no plots: no matplotlib here"; }
impl=triton
report() {  # name, seconds, dtype, batch, steps, width, heads, operators …
    local name=$1-$3 limit=$2 dtype=$3 b=$4 n=$5 dim=$6 heads=$7
    shift 7
    [ "$rehearse" ] && b=1 n=40 dim=16 heads=4
    # Whatever would not end five seconds before the limit is left out.
    step "$name" "$limit" python bench/run.py --device "$device" --dtype "$dtype" \
        --batch "$b" --seq $n --dim "$dim" --heads "$heads" --impl "$impl" \
        --minutes "$(python -c "print(($limit - 5) / 60)")" --models none --ops "$@" \
        --json "$out/$name.json" --csv "$out/$name.csv" ${plots:+--plot "$out/$name.png"}
}

kernels() {  # compiling is what takes time: ten tests to a process, all cores at once
    set -o pipefail
    # What is chosen, here all, runs whole.
    python -m pytest --collect-only -q -p no:cacheprovider -k test_ tests/triton | grep :: | shuf |
        xargs -r -d '\n' -n 10 -P "$jobs" \
            python -m pytest -q -p no:cacheprovider
}
export -f kernels
cores=$(nproc)
export jobs=$((cores < 12 ? cores : 12))
slower=$((12 / jobs))

step env 10 python -m fastmix.env
step kernels $((90 * slower)) bash -c kernels
step self-check $((90 * slower)) python bench/self_check.py --device "$device" $reach \
    --jobs "$jobs" --json "$out/self-check.json"
if [ -z "$rehearse" ]; then
    step tests-gpu 25 python -m pytest -q -p no:cacheprovider -m gpu tests
fi
report scans         65 bfloat16 8 4096        1024 16 gate_loop linear_scan
report scans-8192    30 bfloat16 8 8192        1024 8  gate_loop
report scans-long    30 bfloat16 1 65536       1024 16 gate_loop
report mixers        55 bfloat16 8 8192        512  8  decay_conv windowed_sgu cumulative_mean
report all           40 float32  8 4096        1024 16 gate_loop decay_conv windowed_sgu
impl=native
report fft-conv      25 bfloat16 8 "2048 8192" 512  8  fft_conv
report fft-conv-long 20 bfloat16 1 65536       512  8  fft_conv
for heads in 16 8; do
    step "peers-$heads-heads" 25 python bench/peers.py --device "$device" $shape \
        --heads "$heads" --json "$out/peers-$heads-heads.json"
done
if [ -z "$rehearse" ] && command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        # Torch's caching allocator would hide what lies beyond a tensor's end.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "fft-conv-$tool" 45 \
            compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python -m pytest -q -p no:cacheprovider tests/test_fft_conv_cuda.py \
            -k "on_a_gpu and (257- or 4097- or 8193- or 16385-) and dtype0"
    done
fi

if [ ${#failed[@]} = 0 ]; then
    echo "all steps passed; results are in $out"
else
    echo "failed: ${failed[*]}"
    exit 1
fi
