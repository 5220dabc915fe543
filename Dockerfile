# Serves the demo model; any other model directory by its path:
#
#     docker build --tag kvarena .                                # CPU
#     docker build --tag kvarena:cuda --build-arg DEVICE=cuda .   # NVIDIA GPUs
#     docker run --rm --publish 8000:8000 kvarena
#     docker run --rm --publish 8000:8000 --gpus all --volume DIR:/model:ro kvarena:cuda serve /model --host 0.0.0.0
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY kvarena kvarena
COPY engine engine
COPY allocators allocators
COPY schedulers schedulers
COPY routers routers
COPY experiments experiments
COPY conf conf
COPY reports reports
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG DEVICE=cpu
# Triton compiles its launchers with a C compiler; a CPU image needs none.
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /tmp/wheels
# PyPI's torch brings CUDA along; that of PyTorch's own index has a version "+cpu", which pip prefers where it is offered.
RUN case "$DEVICE" in \
        cpu) index=https://download.pytorch.org/whl/cpu; extras=serve ;; \
        cuda) index=; extras=serve,gpu ;; \
        *) echo "DEVICE=$DEVICE: cpu or cuda" >&2; exit 2 ;; \
    esac \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt ${index:+--extra-index-url "$index"} \
        "$(echo /tmp/wheels/kvarena-*.whl)[$extras]" \
    && rm -rf /tmp/wheels /tmp/constraints.txt
RUN useradd --create-home kvarena
USER kvarena
WORKDIR /home/kvarena
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"
ENTRYPOINT ["kvarena"]
CMD ["serve", "models/demo", "--host", "0.0.0.0", "--port", "8000"]
