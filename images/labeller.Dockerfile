# Template: an image for one labeller that needs an environment of its own. As written it is for MiniCPM-Llama3-V 2.5, whose
# remote code was reported to work with transformers around 4.40 only. Not built or run by this project: the model is not ours
# to ship. The stage in it must speak the same contract (three flags, Parquet in and out); serving the model behind an
# OpenAI-compatible endpoint (vLLM has a class for it) needs no image of ours at all and is the easier way.
#   docker build -f images/labeller.Dockerfile --build-arg TRANSFORMERS=4.40.2 -t rlaifv-labeller .
ARG BASE_IMAGE=docker.io/library/python:3.11-slim
FROM ${BASE_IMAGE}
ARG TRANSFORMERS=4.40.2
ARG TORCH=2.2.2
RUN command -v tini >/dev/null \
 || (apt-get update && apt-get install -y --no-install-recommends tini && rm -rf /var/lib/apt/lists/*)
COPY pyproject.toml README.md LICENSE /src/
COPY rlaifv /src/rlaifv
COPY jobs /src/jobs
COPY controller /src/controller
RUN python3 -m venv /opt/rlaifv \
 && /opt/rlaifv/bin/pip install --quiet --no-cache-dir "torch==${TORCH}" "transformers==${TRANSFORMERS}" \
      timm sentencepiece "numpy<2" pillow pyarrow "pydantic>=2.10" pyyaml tqdm boto3 \
 && /opt/rlaifv/bin/pip install --quiet --no-cache-dir --no-deps /src
ENV PATH=/opt/rlaifv/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
RUN python -c "import jobs._entry, torch, transformers"
ENTRYPOINT ["tini", "--", "python", "-m"]
