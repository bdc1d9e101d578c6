{{/* Name that every object of the release starts with. */}}
{{- define "asd.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 24 | trimSuffix "-" -}}
{{- end -}}

{{/* Image of a component: dict "root" $ "component" "router". */}}
{{- define "asd.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ . }}/{{ end }}asd-{{ .component }}:{{ $image.tag | default .root.Chart.AppVersion }}
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

{{/* What a schema cannot say. */}}
{{- define "asd.validate" -}}
{{- $names := list -}}
{{- range .Values.stages -}}
{{- if has .name $names -}}
{{- fail (printf "stages: two are named %q; give each stage its own name" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- $last := -1 -}}
{{- range $name := .Values.router.staticPlan -}}
{{- if not (has $name $names) -}}
{{- fail (printf "router.staticPlan: %q is not among stages (%s); name stages of this cascade, for instance [%s]" $name (join ", " $names) (last $names)) -}}
{{- end -}}
{{- range $index, $stage := $names -}}
{{- if eq $stage $name -}}
{{- if lt $index $last -}}
{{- fail (printf "router.staticPlan: %q comes after a later stage; name stages in the order of stages (%s)" $name (join ", " $names)) -}}
{{- end -}}
{{- $last = $index -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.policy.enabled .Values.policy.reportsClaim (gt (int .Values.policy.replicas) 1) -}}
{{- fail "policy.reportsClaim: several pods cannot keep one file of reports; set policy.replicas=1, or leave the claim out" -}}
{{- end -}}
{{- if and .Values.policy.enabled (not .Values.policy.artifactClaim) (ne (join "," $names) "small,medium,large") -}}
{{- fail (printf "policy.artifactClaim: the image's policy was made for the stages small, medium, large, not for %s; name a claim with a policy for these, or set policy.enabled=false" (join ", " $names)) -}}
{{- end -}}
{{- end -}}

{{/*
The objects that every component has, but for its Service: ServiceAccount, ConfigMap, PodDisruptionBudget,
Deployment. dict "root" $ "component" "stage-small" "image" "stage-onnx" "config" a dict "port" 50061
"settings" the component's values "startupSeconds" 120 "volumes" a list of dicts name, path, claim, writable
"env" a dict. A claim is mounted read-only where it is not said to be writable.
*/}}
{{- define "asd.component" -}}
{{- $name := printf "%s-%s" (include "asd.fullname" .root) .component -}}
{{- $config := toYaml .config -}}
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
  maxUnavailable: 1
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
  replicas: {{ .settings.replicas }}
  strategy:
    rollingUpdate:
      maxUnavailable: 0
      maxSurge: 1
  selector:
    matchLabels:
      {{- include "asd.selectorLabels" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "asd.labels" . | nindent 8 }}
      annotations:
        checksum/config: {{ $config | sha256sum }}
    spec:
      serviceAccountName: {{ $name }}
      automountServiceAccountToken: false
      # A Service named asd-router would set ASD_ROUTER_* variables, which are settings of ours.
      enableServiceLinks: false
      {{- with .root.Values.image.pullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
      # The preStop sleep, the drain, and some time to end.
      terminationGracePeriodSeconds: {{ add .settings.drainSeconds 8 }}
      securityContext:
        {{- include "asd.podSecurity" . | nindent 8 }}
        {{- range .volumes }}
        {{- if and .claim .writable }}
        # The images' user may then write to a volume that came as root's.
        fsGroup: 10001
        fsGroupChangePolicy: OnRootMismatch
        {{- end }}
        {{- end }}
      containers:
        - name: {{ .image }}
          image: {{ include "asd.image" (dict "root" .root "component" .image) }}
          imagePullPolicy: {{ .root.Values.image.pullPolicy }}
          args: [--config, /etc/asd/config.yaml]
          securityContext:
            {{- include "asd.containerSecurity" . | nindent 12 }}
          env:
            - name: POD_NAME
              valueFrom: {fieldRef: {fieldPath: metadata.name}}
            {{- $env := dict "OTEL_RESOURCE_ATTRIBUTES" (printf "k8s.namespace.name=%s,k8s.pod.name=$(POD_NAME)" .root.Release.Namespace) }}
            {{- with .root.Values.telemetry.endpoint }}
            {{- $_ := set $env "OTEL_EXPORTER_OTLP_ENDPOINT" . }}
            {{- end }}
            {{- range $key, $value := merge (dict) .env .root.Values.telemetry.env $env }}
            - name: {{ $key }}
              value: {{ $value | quote }}
            {{- end }}
          ports:
            - name: grpc
              containerPort: {{ .port }}
          startupProbe:
            grpc: {port: {{ .port }}}
            periodSeconds: 1
            timeoutSeconds: 2
            failureThreshold: {{ .startupSeconds }}
          readinessProbe:
            grpc: {port: {{ .port }}}
            periodSeconds: 2
            timeoutSeconds: 2
            failureThreshold: 2
          livenessProbe:
            grpc: {port: {{ .port }}}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 3
          lifecycle:
            preStop:
              # Time for clients to hear that the pod is going before it refuses calls.
              sleep: {seconds: 3}
          resources:
            {{- .settings.resources | toYaml | nindent 12 }}
          volumeMounts:
            - {name: config, mountPath: /etc/asd, readOnly: true}
            - {name: tmp, mountPath: /tmp}
            {{- range .volumes }}
            - {name: {{ .name }}, mountPath: {{ .path }}{{ if and .claim (not .writable) }}, readOnly: true{{ end }}}
            {{- end }}
      volumes:
        - name: config
          configMap: {name: {{ $name }}}
        - name: tmp
          emptyDir: {sizeLimit: 64Mi}
        {{- range .volumes }}
        - name: {{ .name }}
          {{- if .claim }}
          persistentVolumeClaim: {claimName: {{ .claim }}{{ if not .writable }}, readOnly: true{{ end }}}
          {{- else }}
          emptyDir: {}
          {{- end }}
        {{- end }}
      {{- with .settings.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .settings.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end -}}

{{- define "asd.podSecurity" -}}
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

{{/* Service of a component: dict "root" $ "component" "stage-small" "port" 50061 "type" "Headless". */}}
{{- define "asd.service" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "asd.fullname" .root }}-{{ .component }}
  labels:
    {{- include "asd.labels" . | nindent 4 }}
spec:
  {{- if eq .type "Headless" }}
  # gRPC keeps one connection for many calls, so clients must see the pods to balance over them.
  clusterIP: None
  {{- else }}
  type: {{ .type }}
  {{- end }}
  selector:
    {{- include "asd.selectorLabels" . | nindent 4 }}
  ports:
    - name: grpc
      port: {{ .port }}
      targetPort: grpc
      appProtocol: kubernetes.io/h2c
{{- end -}}
