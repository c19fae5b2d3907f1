#!/usr/bin/env bash
# Chains stages: each is a job that starts once the one before has succeeded, and is cancelled where that one failed.
#
#   slurm/pipeline.sh --cluster configs/cluster/gpu8.yaml runs/study \
#     sft="-c configs/recipes/sft_full.yaml" \
#     reward="-c configs/recipes/reward.yaml" \
#     ppo="-c configs/recipes/ppo_rm.yaml --model.critic.name {reward}"
#
# NAME=ARGUMENTS is a stage: the arguments of `ptl fit`, in the run folder runs/study/NAME; NAME="ptl synth ..." is
# another command, whose tasks share the work where it can be shared. The policy of a stage is the
# model that the stage before has exported, unless its arguments set --model.policy.name; {NAME} stands for the exported
# model of an earlier stage. A stage looks for runs/study/NAME/stage.json, which names the export, before it starts.
# NAME@N=... asks for N nodes. --dry-run prints what would be submitted; other options are those of train.sbatch.
# SFT -> reward -> GRPO, SFT -> distillation and others: docs/slurm.md.
set -euo pipefail
# shellcheck source=slurm/job.sh
source "$(dirname "$0")/job.sh"
usage() { sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2; }
options=() stages=() study="" dry=""
while (($#)); do
  case $1 in
    --cluster | --sbatch) [[ $# -gt 1 ]] || usage; options+=("$1" "$2"); shift ;;
    --dry-run) options+=("$1"); dry=1 ;;
    --*) options+=("$1") ;;
    *=*) stages+=("$1") ;;
    *) study=$1 ;;
  esac
  shift
done
[[ -n $study && ${#stages[@]} -gt 0 ]] || usage
names=() previous="" before=""
for stage in "${stages[@]}"; do
  name=${stage%%=*} text=${stage#*=} nodes=()
  if [[ $name == *@* ]]; then nodes=(--sbatch "--nodes=${name#*@}") name=${name%%@*}; fi
  needs=()
  for known in "${names[@]}"; do # an earlier stage's model by its name
    [[ $text != *"{$known}"* ]] || needs+=("$study/$known/stage.json")
    text=${text//"{$known}"/"$study/$known/export"}
  done
  if [[ $text =~ \{([A-Za-z0-9_-]+)\} ]]; then
    echo "pipeline: error: $name names {${BASH_REMATCH[1]}}, which is no earlier stage (${names[*]:-there is none})" >&2
    exit 2
  fi
  read -r -a arguments <<<"$text"
  names+=("$name")
  if [[ ${arguments[0]} != ptl ]]; then
    if [[ -n $before && $text != *--model.policy.name* ]]; then
      arguments+=(--model.policy.name "$study/$before/export")
      needs+=("$study/$before/stage.json")
    fi
    arguments+=(--run.dir "$study/$name")
    before=$name
  fi
  dependency=()
  if [[ -n $previous ]]; then
    dependency=(--sbatch "--dependency=afterok:$previous" --sbatch --kill-on-invalid-dep=yes)
  fi
  export PTL_NEEDS="${needs[*]}" PTL_RUN=$study/$name
  job=$(submit "$PTL_SLURM/train.sbatch" "${options[@]}" "${nodes[@]}" "${dependency[@]}" \
    --sbatch "--job-name=${study##*/}-$name" "${arguments[@]}")
  if [[ -n $dry ]]; then
    echo "PTL_NEEDS='$PTL_NEEDS' $job"
    previous="<job of $name>"
  else
    previous=${job%%;*}
    echo "$name: job $previous, $study/$name"
  fi
done
