# shellcheck shell=bash
# Sourced by the scripts beside it: submitting with a cluster's profile, the start of a job, and what follows its end.
PTL_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${PTL_PYTHON:=python}"
sbatch_options=() srun_options=(--mpi=none) container_command=() again=()
job_setup() { :; }

# submit SCRIPT [--cluster FILE] [--dry-run] [--sbatch OPTION]... ARGUMENTS: submits SCRIPT with ARGUMENTS, or says how.
# Prints the job's number alone on the last line.
submit() {
  local script=$1 profile="" dry="" extra=() arguments=()
  shift
  while (($#)); do
    case $1 in
      --cluster) profile=$2; shift ;;
      --cluster=*) profile=${1#*=} ;;
      --sbatch) extra+=("$2"); shift ;;
      --sbatch=*) extra+=("${1#*=}") ;;
      --dry-run) dry=1 ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  PTL_PROFILE=""
  if [[ -n $profile ]]; then
    PTL_PROFILE=$("$PTL_PYTHON" -m ptl.apps.cluster "$profile") || return 2
    eval "$PTL_PROFILE"
  fi
  export PTL_PROFILE PTL_SLURM PTL_PYTHON
  local command=(sbatch --parsable "${sbatch_options[@]}" "${extra[@]}" "$script" "${arguments[@]}")
  if [[ -n $dry ]]; then
    printf '%q ' "${command[@]}" && echo
    [[ -z $PTL_PROFILE ]] || echo "# ${PTL_PROFILE//$'\n'/$'\n'# }"
    return 0
  fi
  "${command[@]}"
}

# begin RUN: the folder of this attempt, its log, and the environment that every rank needs.
begin() {
  run=$1
  restarts=$((${SLURM_RESTART_COUNT:-0} + ${PTL_RESTARTS:-0}))
  mkdir -p "$run/slurm"
  attempt=1
  while ! mkdir "$run/slurm/attempt_$attempt" 2>/dev/null; do attempt=$((attempt + 1)); done
  logs=$run/slurm/attempt_$attempt
  ln -sfn "attempt_$attempt" "$run/slurm/latest"
  [[ -z ${PTL_PROFILE:-} ]] || eval "$PTL_PROFILE"
  job_setup
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take over sbatch's --cpus-per-task
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} PYTHONFAULTHANDLER=1
  # Not a MASTER_ADDR that the submitting shell or an earlier job has left in the environment.
  MASTER_ADDR=${PTL_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  MASTER_PORT=${PTL_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  export MASTER_ADDR MASTER_PORT
  local end
  end=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e || true)
  PTL_JOB_END=$(date --date "$end" +%s 2>/dev/null || true) # unlimited jobs have none
  export PTL_JOB_END
  echo "$(date -Is) job $SLURM_JOB_ID, attempt $attempt, restart $restarts, nodes $SLURM_JOB_NODELIST, logs in $logs"
}

# launch COMMAND...: on every task of the job, each with a log of its own; the first that fails ends them all, and its
# code is returned: srun's own is the highest, which may be that of a task that was ended because of the first.
launch() {
  local code=0 first
  srun --kill-on-bad-exit=1 --output="$logs/rank%t.log" --open-mode=append "${srun_options[@]}" \
    "${container_command[@]}" "$@" 2>"$logs/srun.log" || code=$?
  first=$(grep -m 1 -oE 'tasks? [0-9,-]+: [A-Z].*' "$logs/srun.log")
  cat "$logs/srun.log" >&2
  [[ $first != *'exit code '* ]] || code=${first##* }
  [[ $first != *Killed* ]] || code=137
  return "$code"
}

# fit ARGUMENTS...: `ptl fit` on every task; goes on where an earlier start of the job has stopped, and ends the job.
fit() {
  local code=0
  ((restarts == 0)) || set -- "$@" --run.resume auto
  launch "$PTL_PYTHON" -m ptl.cli fit "$@" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "${SLURM_NTASKS_PER_NODE:-1}" || code=$?
  ((code == 0)) || tail -n 5 "$logs/rank0.log"
  finish "$code"
}

# finish CODE: ends the job, or has it start again: when it was asked to leave (85), and after a crash where a newer
# checkpoint has come since the last one, at most PTL_MAX_CRASHES times without. Never more than PTL_MAX_RESTARTS times.
finish() {
  local code=$1 newest last="" crashes=0 state
  newest=$(find "$run/checkpoints" -maxdepth 1 -name '[!.]*.ckpt' -printf '%f\n' 2>/dev/null | sort | tail -n 1)
  echo "$(date -Is) attempt $attempt ended with code $code, newest checkpoint ${newest:-none}"
  case $code in 0) exit 0 ;; 2) echo "a mistake in the command or the data: not started again"; exit 2 ;; esac
  # shellcheck disable=SC1091
  [[ ! -f $run/slurm/crashes ]] || read -r crashes last <"$run/slurm/crashes"
  if ((code != 85 && code != 87)); then
    [[ $newest == "$last" ]] && crashes=$((crashes + 1)) || crashes=1
    echo "$crashes $newest" >"$run/slurm/crashes"
    if ((crashes > ${PTL_MAX_CRASHES:-2})); then
      echo "stopped: $crashes crashes in a row without a new checkpoint; see $logs"
      exit "$code"
    fi
  fi
  if ((restarts >= ${PTL_MAX_RESTARTS:-100})); then
    echo "stopped: started again $restarts times already (PTL_MAX_RESTARTS)"
    exit "$code"
  fi
  state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T || true)
  if [[ $state != RUNNING ]]; then # cancelled, or out of time: the person or the cluster wanted it gone
    echo "not started again: the job is ${state:-gone}"
    exit "$code"
  fi
  echo "starts again"
  scontrol requeue "$SLURM_JOB_ID" && sleep 120
  # Requeueing is off on this cluster: a new job takes over.
  PTL_RESTARTS=$((restarts + 1)) sbatch "${sbatch_options[@]}" --job-name="$SLURM_JOB_NAME" \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="${SLURM_NTASKS_PER_NODE:-1}" \
    --output="$run/slurm/%j.out" --dependency="afterany:$SLURM_JOB_ID" "${again[@]}"
  exit 0
}
