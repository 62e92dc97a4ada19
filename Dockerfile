# Midway with its default feature network; on the CPU unless TORCH_INDEX names another index of torch's wheels:
#   docker build -t midway .
#   docker build -t midway --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   docker run --rm -v "$PWD:/data" midway train tokenizer digits-fsq
FROM python:3.13-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch.compile and Triton compile C++ when they run
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

RUN pip install torch torchvision --index-url "$TORCH_INDEX"

WORKDIR /opt/midway
COPY pyproject.toml README.md LICENSE ./
COPY gen gen
COPY samplers samplers
COPY tokenizers tokenizers
RUN pip install '.[effnet,data]'

# runs/ is written below the current directory
RUN useradd --create-home midway && mkdir /data && chown midway /data
USER midway
WORKDIR /data
ENTRYPOINT ["midway"]
CMD ["--help"]
