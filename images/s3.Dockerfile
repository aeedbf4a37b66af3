# versitygw, a small S3 server, for k8s/s3/. Build the program first (Go), then the image, from the repository's root:
#   cd k8s/dev/s3 && CGO_ENABLED=0 go build -o ../../../build/versitygw github.com/versity/versitygw/cmd/versitygw
#   docker build -f images/s3.Dockerfile --build-arg BASE_IMAGE=debian:bookworm-slim -t versitygw build
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim
FROM ${BASE_IMAGE}
COPY versitygw /usr/local/bin/versitygw
USER 10001:10001
ENTRYPOINT ["versitygw"]
