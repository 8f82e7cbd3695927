# make demo      install; train an SAE on the embedded model and fine-tune it: three minutes
# make test      the tests, but the lesson's own (experiments/test_lesson.py: ten minutes)
# make compare   every method of the paper on the embedded model: about 15 minutes
# make lesson    the method, built by the reader in a notebook; without a display it runs it
# make bench     time and memory of each stage beside its floor
# TORCH=torch    installs PyTorch's newest build (with CUDA on Linux) instead of this one
TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN = .venv/bin
RUN = $(BIN)/python

demo: .venv/main
	$(RUN) saeft.py --overwrite

test: .venv/test
	$(RUN) -m pytest -q -n 2 test_saeft.py experiments/test_experiments.py experiments/test_forks.py

compare: .venv/plot
	$(RUN) experiments/compare.py --tokens 300k --kl-tokens 80k --eval-tokens 25k --buffer 500
	$(RUN) experiments/plot.py runs/compare

lesson: .venv/lesson
	if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ]; \
	then $(BIN)/jupyter notebook experiments/lesson.ipynb; \
	else $(BIN)/jupyter nbconvert --execute --to html --output-dir runs experiments/lesson.ipynb; fi

bench: .venv/main
	$(RUN) experiments/bench.py

.venv/main: Makefile pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet numpy "tiktoken>=0.13" "huggingface_hub>=0.30"
	touch $@

.venv/plot: .venv/main
	$(BIN)/pip install --quiet matplotlib
	touch $@

.venv/lesson: .venv/plot
	$(BIN)/pip install --quiet notebook nbconvert nbclient ipykernel
	touch $@

.venv/test: .venv/main
	$(BIN)/pip install --quiet pytest safetensors sentencepiece "tokenizers>=0.20" transformers pytest-timeout pytest-xdist hypothesis zstandard
	touch $@

.PHONY: demo test compare lesson bench
