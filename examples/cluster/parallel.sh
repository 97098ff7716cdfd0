#!/usr/bin/env bash
# A batch as a list of commands, one `dpe edit` a line, run by GNU parallel.
#
#   ./parallel.sh clips.jsonl 'out/{id}.mp4' --jobs 2
#
# What was done is in dpe.joblog: started again, it does the rest. The same list goes to OpenCue with
#   cuecmd commands.txt --chunk 4
# Every command loads the networks anew; `dpe batch` does so once, and is faster for short clips.
set -euo pipefail
manifest=$1 template=$2
shift 2

dpe batch "$manifest" --output-template "$template" --print-commands >commands.txt
parallel --joblog dpe.joblog --resume-failed "$@" <commands.txt
