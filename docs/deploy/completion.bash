# shellcheck shell=bash
# Completes `myllm` in bash, and in zsh after `autoload -U bashcompinit && bashcompinit`. Add to ~/.bashrc or ~/.zshrc:
#   source /path/to/MyLLM/docs/deploy/completion.bash
# Commands and options are those of --help, asked for once in each shell; runs are the folders of temp_data/runs.
_myllm() {
  local word=${COMP_WORDS[COMP_CWORD]} first=${COMP_WORDS[1]} second=${COMP_WORDS[2]:-} command words
  : "${_myllm_commands:=$(COLUMNS=200 myllm --help | sed -n 's/^  \([a-z][a-z-]*\( [a-z][a-z-]*\)\{0,1\}\)  .*/\1/p')}"
  command=$first
  if grep -q "^$first " <<<"$_myllm_commands"; then command="$first $second"; fi
  if [ "$COMP_CWORD" = 1 ]; then
    words=$(cut -d ' ' -f 1 <<<"$_myllm_commands" | sort -u)
  elif [ "$COMP_CWORD" = 2 ] && [ "$command" != "$first" ]; then
    words=$(sed -n "s/^$first //p" <<<"$_myllm_commands")
  elif [ "${word#-}" != "$word" ]; then
    case "$command" in plan | preflight) command="$command debug" ;; esac # their options are a preset's
    # shellcheck disable=SC2086 # a command of two words
    words=$(COLUMNS=200 myllm $command --help 2>/dev/null | grep -oE -e '--[a-z][a-z0-9.-]*[a-z0-9]' | sort -u)
  else
    words=$(ls "${MYLLM_DATA:-temp_data}/runs" 2>/dev/null)
    case "$command" in plan | preflight | prove-resume)
      words=$(myllm plan --help | sed -n '/^presets:/,/^$/s/^  \([a-z0-9-]*\) .*/\1/p') ;;
    esac
  fi
  # shellcheck disable=SC2207 # one word a line; bash 3.2 has no mapfile
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _myllm myllm
