{{/* Name that every object of the release starts with. */}}
{{- define "asd.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name -}}
{{- end -}}

{{/* Image of a component: dict "root" $ "image" "stage-onnx". */}}
{{- define "asd.image" -}}
{{- $image := .root.Values.image -}}
{{- $digest := get ($image.digests | default dict) (.image | replace "-" "_" | camelcase | untitle) -}}
{{- with $image.registry }}{{ . }}/{{ end }}asd-{{ .image }}
{{- if $digest }}@{{ $digest }}{{ else }}:{{ $image.tag | default .root.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{/* Labels that select a component's pods: dict "root" $ "component" "stage-small". They never change. */}}
{{- define "asd.selectorLabels" -}}
app.kubernetes.io/name: asd
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of a component's objects: dict "root" $ "component" "stage-small". */}}
{{- define "asd.labels" -}}
{{ include "asd.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* Settings of a stage: its entry over stageDefaults. dict "root" $ "stage" an entry of stages. Yields YAML. */}}
{{- define "asd.stage" -}}
{{- mergeOverwrite (deepCopy .root.Values.stageDefaults) (deepCopy .stage) | toYaml -}}
{{- end -}}

{{/* Options of a model's engine, as YAML: the section of values that is the engine's. Takes a stage's model. */}}
{{- define "asd.engineOptions" -}}
{{- get . (.engine | camelcase | untitle) | default dict | toYaml -}}
{{- end -}}

{{/* Image of an engine: "tensorrt_llm" is served by asd-stage-tensorrt-llm. */}}
{{- define "asd.engineImage" -}}
stage-{{ . | replace "_" "-" }}
{{- end -}}

{{/* Secret with a service's certificate. dict "root" $ "component" "stage-small". */}}
{{- define "asd.tlsSecret" -}}
{{- $tls := .root.Values.tls -}}
{{- if eq $tls.mode "certManager" -}}
{{- include "asd.fullname" .root }}-{{ .component }}-tls
{{- else -}}
{{- $key := ternary "stages" .component (hasPrefix "stage-" .component) -}}
{{- get $tls.secretNames $key | default $tls.secretName -}}
{{- end -}}
{{- end -}}

{{/* Variables by which libraries do not report their use to their makers (services/common/privacy.py), as YAML. */}}
{{- define "asd.privacy" -}}
ORT_DISABLE_TELEMETRY: "1"
VLLM_NO_USAGE_STATS: "1"
TRTLLM_NO_USAGE_STATS: "1"
HF_HUB_DISABLE_TELEMETRY: "1"
DO_NOT_TRACK: "1"
{{- end -}}

{{/*
How a service of the release calls another one: its setting `tls`, as YAML; {} where connections are plain.
dict "root" $ "wantsCertificate" whether the called one asks for a certificate.
*/}}
{{- define "asd.clientTls" -}}
{{- if .root.Values.tls.enabled -}}
{{- $tls := dict "ca_file" "/tls/ca.crt" -}}
{{- if .wantsCertificate -}}
{{- $tls = merge $tls (dict "cert_file" "/tls/tls.crt" "key_file" "/tls/tls.key") -}}
{{- end -}}
{{- dict "tls" $tls | toYaml -}}
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{/*
The objects that every component has, but for its Service: ServiceAccount, ConfigMap, PodDisruptionBudget,
Deployment. dict "root" $ "component" "stage-small" "image" "stage-onnx" "config" a dict "port" 50061
"settings" the component's values "startupSeconds" 120 "volumes" a list of dicts name, path, claim, writable
"env" a dict. A claim is mounted read-only where it is not said to be writable. Optional: "replicas" a number,
left out where something else sets it; "protocol" "http" where the port does not speak gRPC; "wantsCertificate": callers
must show one; "guarded": callers must show a token; "apiAccess": the pod calls the Kubernetes API; "gpus",
"gpuResource", "sharedMemory", "tmpSize", "updateStrategy".
*/}}
{{- define "asd.component" -}}
{{- $root := .root -}}
{{- $settings := .settings -}}
{{- $name := printf "%s-%s" (include "asd.fullname" $root) .component -}}
{{- $rollout := $root.Values.rollout -}}
{{- $tls := $root.Values.tls -}}
{{- $metricsPort := int $root.Values.telemetry.metricsPort -}}
{{- $protocol := .protocol | default "grpc" -}}
{{- /* Kubernetes' gRPC probes cannot speak TLS. */}}
{{- $healthPort := ternary 50059 0 (and $tls.enabled (eq $protocol "grpc")) -}}
{{- $probe := dict "grpc" (dict "port" ($healthPort | default .port)) -}}
{{- if eq $protocol "http" -}}
{{- $probe = dict "httpGet" (dict "path" "/healthz" "port" "http" "scheme" (ternary "HTTPS" "HTTP" $tls.enabled)) -}}
{{- /* Probes have no certificate to show. */}}
{{- if and $tls.enabled .wantsCertificate -}}
{{- $probe = dict "tcpSocket" (dict "port" "http") -}}
{{- end -}}
{{- end -}}
{{- $served := dict "listen" (printf "0.0.0.0:%d" .port) -}}
{{- if $tls.enabled -}}
{{- $shown := dict "cert_file" "/tls/tls.crt" "key_file" "/tls/tls.key" -}}
{{- if .wantsCertificate -}}
{{- $shown = merge $shown (dict "client_ca_file" "/tls/ca.crt") -}}
{{- end -}}
{{- $served = merge $served (dict "tls" $shown) -}}
{{- end -}}
{{- with $healthPort -}}
{{- $served = merge $served (dict "health_listen" (printf "0.0.0.0:%d" (int .))) -}}
{{- end -}}
{{- if $metricsPort -}}
{{- $served = merge $served (dict "metrics_listen" (printf "0.0.0.0:%d" $metricsPort)) -}}
{{- end -}}
{{- with $settings.maxConnectionAgeSeconds -}}
{{- $served = merge $served (dict "grpc" (dict "max_connection_age_ms" (mul (int .) 1000))) -}}
{{- end -}}
{{- $config := merge $served .config | toYaml -}}
{{- range $key, $value := $settings.podLabels -}}
{{- if or (hasPrefix "app.kubernetes.io/" $key) (hasPrefix "helm.sh/" $key) -}}
{{- fail (printf "%s: podLabels may not set %s, by which the release knows its pods; choose another label" $.component $key) -}}
{{- end -}}
{{- end -}}
{{- $needed := add $rollout.preStopSeconds $settings.drainSeconds | int -}}
{{- $grace := int $settings.terminationGracePeriodSeconds | default (add $needed 5 | int) -}}
{{- if lt $grace $needed -}}
{{- fail (printf "%s: terminationGracePeriodSeconds %d would kill calls that may still go on; set it to %d or more (rollout.preStopSeconds and drainSeconds), or to 0" .component $grace $needed) -}}
{{- end -}}
{{- $update := .updateStrategy | default (dict "maxUnavailable" 0 "maxSurge" 1) -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ $name }}
  labels:
    {{- include "asd.labels" . | nindent 4 }}
automountServiceAccountToken: false
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ $name }}
  labels:
    {{- include "asd.labels" . | nindent 4 }}
data:
  config.yaml: |
    {{- $config | nindent 4 }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ $name }}
  labels:
    {{- include "asd.labels" . | nindent 4 }}
spec:
  # Nodes are drained one pod at a time. minAvailable would keep a component of one pod on its node for good.
  maxUnavailable: 1
  # A pod that is not ready serves nobody, so that it may not hold up a drain.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "asd.selectorLabels" . | nindent 6 }}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  labels:
    {{- include "asd.labels" . | nindent 4 }}
spec:
  {{- if hasKey . "replicas" }}
  replicas: {{ .replicas }}
  {{- end }}
  # The old pod goes once the new one is ready, and has been for as long as clients' DNS may not know it.
  minReadySeconds: {{ $rollout.minReadySeconds }}
  # Kubernetes' default of 600 would call a model that loads for longer a failed rollout.
  progressDeadlineSeconds: {{ max 600 (add .startupSeconds $rollout.minReadySeconds 300) }}
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: {{ $update.maxUnavailable }}
      maxSurge: {{ $update.maxSurge }}
  selector:
    matchLabels:
      {{- include "asd.selectorLabels" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "asd.labels" . | nindent 8 }}
        {{- with $settings.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      annotations:
        checksum/config: {{ $config | sha256sum }}
        {{- with $settings.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      serviceAccountName: {{ $name }}
      automountServiceAccountToken: {{ .apiAccess | default false }}
      # A Service named asd-router would set ASD_ROUTER_* variables, which are settings of ours.
      enableServiceLinks: false
      {{- with $root.Values.image.pullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
      {{- with $settings.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with $settings.runtimeClassName }}
      runtimeClassName: {{ . }}
      {{- end }}
      # The preStop sleep, the drain, and some time to end.
      terminationGracePeriodSeconds: {{ $grace }}
      securityContext:
        {{- include "asd.podSecurity" $root | nindent 8 }}
        {{- $writes := false }}
        {{- range .volumes }}
        {{- if and .claim .writable }}{{ $writes = true }}{{ end }}
        {{- end }}
        {{- if $writes }}
        # The pod's user may then write to a volume that came as root's.
        {{- if not (kindIs "invalid" $root.Values.podSecurity.fsGroup) }}
        fsGroup: {{ int64 $root.Values.podSecurity.fsGroup }}
        {{- end }}
        fsGroupChangePolicy: OnRootMismatch
        {{- end }}
      containers:
        - name: {{ .image }}
          image: {{ include "asd.image" (dict "root" $root "image" .image) }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          args: [--config, /etc/asd/config.yaml]
          securityContext:
            {{- include "asd.containerSecurity" . | nindent 12 }}
          env:
            - name: POD_NAME
              valueFrom: {fieldRef: {fieldPath: metadata.name}}
            {{- $env := dict "OTEL_RESOURCE_ATTRIBUTES" (printf "k8s.namespace.name=%s,k8s.pod.name=$(POD_NAME)" $root.Release.Namespace) }}
            {{- with $root.Values.telemetry.endpoint }}
            {{- $env = merge $env (dict "OTEL_EXPORTER_OTLP_ENDPOINT" .) }}
            {{- end }}
            {{- $env = merge $env (include "asd.privacy" . | fromYaml) }}
            {{- range $key, $value := merge (dict) .env $root.Values.telemetry.env $env }}
            - name: {{ $key }}
              value: {{ $value | quote }}
            {{- end }}
          ports:
            - name: {{ $protocol }}
              containerPort: {{ .port }}
            {{- with $healthPort }}
            - name: health
              containerPort: {{ . }}
            {{- end }}
            {{- if $metricsPort }}
            - name: metrics
              containerPort: {{ $metricsPort }}
            {{- end }}
          # Serving begins when the model is loaded: until then nothing else is asked.
          startupProbe:
            {{- toYaml $probe | nindent 12 }}
            periodSeconds: 1
            timeoutSeconds: 2
            failureThreshold: {{ .startupSeconds }}
          readinessProbe:
            {{- toYaml $probe | nindent 12 }}
            periodSeconds: 2
            timeoutSeconds: 2
            # A busy node may keep a healthy process waiting for seconds.
            failureThreshold: 4
          livenessProbe:
            {{- toYaml $probe | nindent 12 }}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 3
          {{- if $rollout.preStopSeconds }}
          lifecycle:
            preStop:
              # Time for clients to hear that the pod is going before it refuses calls.
              sleep: {seconds: {{ $rollout.preStopSeconds }}}
          {{- end }}
          {{- $resources := deepCopy ($settings.resources | default dict) }}
          {{- if .gpus }}
          {{- /* Kubernetes takes the limit of such a resource for its request. */}}
          {{- $resources = merge (dict "limits" (dict .gpuResource .gpus)) $resources }}
          {{- end }}
          resources:
            {{- $resources | toYaml | nindent 12 }}
          volumeMounts:
            - {name: config, mountPath: /etc/asd, readOnly: true}
            - {name: tmp, mountPath: /tmp}
            {{- if $tls.enabled }}
            - {name: tls, mountPath: /tls, readOnly: true}
            {{- end }}
            {{- if .guarded }}
            - {name: auth, mountPath: /auth, readOnly: true}
            {{- end }}
            {{- if .sharedMemory }}
            - {name: shm, mountPath: /dev/shm}
            {{- end }}
            {{- range .volumes }}
            - {name: {{ .name }}, mountPath: {{ .path }}{{ if and .claim (not .writable) }}, readOnly: true{{ end }}}
            {{- end }}
      volumes:
        - name: config
          configMap: {name: {{ $name }}}
        - name: tmp
          emptyDir: {sizeLimit: {{ .tmpSize | default "64Mi" }}}
        {{- if $tls.enabled }}
        - name: tls
          secret: {secretName: {{ include "asd.tlsSecret" . }}}
        {{- end }}
        {{- if .guarded }}
        - name: auth
          secret:
            secretName: {{ $root.Values.auth.secretName }}
            items: [{key: {{ $root.Values.auth.key | quote }}, path: tokens}]
        {{- end }}
        {{- with .sharedMemory }}
        - name: shm
          emptyDir: {medium: Memory, sizeLimit: {{ . }}}
        {{- end }}
        {{- range .volumes }}
        - name: {{ .name }}
          {{- if .claim }}
          persistentVolumeClaim: {claimName: {{ .claim }}{{ if not .writable }}, readOnly: true{{ end }}}
          {{- else }}
          emptyDir: {}
          {{- end }}
        {{- end }}
      {{- with $settings.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $settings.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $settings.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if $settings.topologySpreadConstraints }}
      topologySpreadConstraints:
        {{- range $settings.topologySpreadConstraints }}
        - {{ toYaml . | nindent 10 | trim }}
          labelSelector:
            matchLabels:
              {{- include "asd.selectorLabels" $ | nindent 14 }}
          # Pods of the version before do not count while they are replaced.
          matchLabelKeys: [pod-template-hash]
        {{- end }}
      {{- end }}
{{- end -}}

{{/* Whom a pod runs as. Where the cluster chooses, nothing is said. */}}
{{- define "asd.podSecurity" -}}
{{- with .Values.podSecurity.runAsUser }}
runAsUser: {{ int64 . }}
{{- end }}
{{- if not (kindIs "invalid" .Values.podSecurity.runAsGroup) }}
runAsGroup: {{ int64 .Values.podSecurity.runAsGroup }}
{{- end }}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "asd.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/*
Service of a component: dict "root" $ "component" "stage-small" "port" 50061 "type" "Headless" "annotations" a dict.
Optional: "protocol" "http" where the port does not speak gRPC.
*/}}
{{- define "asd.service" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "asd.fullname" .root }}-{{ .component }}
  labels:
    {{- include "asd.labels" . | nindent 4 }}
  {{- with .annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if eq .type "Headless" }}
  # gRPC keeps one connection for many calls, so clients must see the pods to balance over them.
  clusterIP: None
  {{- else }}
  type: {{ .type }}
  {{- end }}
  selector:
    {{- include "asd.selectorLabels" . | nindent 4 }}
  {{- $protocol := .protocol | default "grpc" }}
  ports:
    - name: {{ $protocol }}
      port: {{ .port }}
      targetPort: {{ $protocol }}
      {{- if and (eq $protocol "grpc") (not .root.Values.tls.enabled) }}
      appProtocol: kubernetes.io/h2c
      {{- end }}
{{- end -}}

{{/* Autoscaler by CPU: dict "root" $ "component" "router" "settings" the component's values. */}}
{{- define "asd.autoscaler" -}}
{{- $name := printf "%s-%s" (include "asd.fullname" .root) .component -}}
{{- $scaling := .settings.autoscaling -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ $name }}
  labels:
    {{- include "asd.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ $name }}}
  minReplicas: {{ $scaling.minReplicas }}
  maxReplicas: {{ $scaling.maxReplicas }}
  metrics:
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: {{ $scaling.targetCpuPercent }}}
  behavior:
    scaleDown:
      stabilizationWindowSeconds: {{ $scaling.scaleDownSeconds }}
{{- end -}}

{{/*
Ingress of a component: dict "root" $ "component" "router" "port" the name of its Service's port "settings" its values
"annotations" a dict "paths" a dict of path and type.
*/}}
{{- define "asd.ingress" -}}
{{- $name := printf "%s-%s" (include "asd.fullname" .root) .component -}}
{{- $port := .port -}}
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {{ $name }}
  labels:
    {{- include "asd.labels" . | nindent 4 }}
  {{- with .annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with .settings.className }}
  ingressClassName: {{ . }}
  {{- end }}
  {{- if .settings.tlsSecretName }}
  tls:
    - hosts: [{{ .settings.host | quote }}]
      secretName: {{ .settings.tlsSecretName }}
  {{- end }}
  rules:
    - host: {{ .settings.host | quote }}
      http:
        paths:
          {{- range $path, $type := .paths }}
          - path: {{ $path }}
            pathType: {{ $type }}
            backend:
              service: {name: {{ $name }}, port: {name: {{ $port }}}}
          {{- end }}
{{- end -}}

{{/* Where a route of the Gateway API belongs, and its host names. Takes the route's values. */}}
{{- define "asd.parents" -}}
parentRefs:
  - name: {{ .gateway }}
    {{- with .gatewayNamespace }}
    namespace: {{ . }}
    {{- end }}
    {{- with .sectionName }}
    sectionName: {{ . }}
    {{- end }}
{{- with .hostnames }}
hostnames:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
