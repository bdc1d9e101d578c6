{{/* What a schema cannot say. Every sentence names the value and says what to change. */}}
{{- define "asd.validate" -}}
{{- $name := include "asd.fullname" . -}}
{{- if gt (len $name) 24 -}}
{{- fail (printf "fullnameOverride: %q has %d characters, and Kubernetes allows 63 for a name that those of stages follow; install under a name of 24 at most, or set fullnameOverride to a shorter one" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "fullnameOverride: %q cannot begin names of Services, which have a letter first and no dots; install under a name such as \"asd\", or set fullnameOverride to one" $name) -}}
{{- end -}}
{{- $port := int .Values.telemetry.metricsPort -}}
{{- $taken := dict "8000" "the gateway" "50050" "the router" "50051" "the policy service" "50053" "the manager" "50059" "probes under TLS" "50061" "stages" -}}
{{- with get $taken (toString $port) -}}
{{- fail (printf "telemetry.metricsPort: %d is the port of %s; set another one, for instance 9464" $port .) -}}
{{- end -}}
{{- include "asd.validateResources" . -}}
{{- include "asd.validateCascade" . -}}
{{- range $index, $_ := .Values.stages -}}
{{- include "asd.validateStage" (dict "root" $ "index" $index "name" .name "stage" (include "asd.stage" (dict "root" $ "stage" .) | fromYaml)) -}}
{{- end -}}
{{- include "asd.validatePolicy" . -}}
{{- include "asd.validateScaling" . -}}
{{- include "asd.validateAccess" . -}}
{{- end -}}

{{- define "asd.validateCascade" -}}
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
{{- end -}}

{{/* After the stages' own mistakes, which are nearer to what was just set. */}}
{{- define "asd.validatePolicy" -}}
{{- $names := list -}}
{{- range .Values.stages }}{{ $names = append $names .name }}{{ end -}}
{{- $policy := .Values.policy -}}
{{- if $policy.enabled -}}
{{- $pods := ternary (int $policy.autoscaling.maxReplicas) (int $policy.replicas) $policy.autoscaling.enabled -}}
{{- if and $policy.reportsClaim (gt $pods 1) -}}
{{- fail "policy.reportsClaim: several pods cannot keep one file of reports; set policy.replicas=1 and policy.autoscaling.enabled=false, or leave the claim out" -}}
{{- end -}}
{{- if and (not $policy.artifactClaim) (ne (join "," $names) "small,medium,large") -}}
{{- fail (printf "policy.artifactClaim: the image's policy was made for the stages small, medium, large, not for %s; name a claim with a policy for these, or set policy.enabled=false" (join ", " $names)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* null takes a block of the chart's values away, and templates read it. */}}
{{- define "asd.validateResources" -}}
{{- range $key := list "router" "gateway" "policy" "manager" "stageDefaults" -}}
{{- $settings := get $.Values $key -}}
{{- if not (kindIs "map" $settings.resources) -}}
{{- fail (printf "%s.resources: null is no setting; to ask for nothing, set %s.resources.requests=null and %s.resources.limits=null" $key $key $key) -}}
{{- end -}}
{{- include "asd.validateRequests" (dict "where" $key "resources" $settings.resources) -}}
{{- end -}}
{{- end -}}

{{/* dict "where" who asks "resources" its resources. What has another unit than these is Kubernetes' to judge. */}}
{{- define "asd.validateRequests" -}}
{{- $where := .where -}}
{{- $limits := .resources.limits | default dict -}}
{{- range $name, $request := .resources.requests | default dict -}}
{{- $limit := get $limits $name -}}
{{- $wanted := include "asd.quantity" $request -}}
{{- $most := include "asd.quantity" $limit -}}
{{- if and $wanted $most (gt (float64 $wanted) (float64 $most)) -}}
{{- fail (printf "%s: resources.requests.%s %v is above resources.limits.%s %v; raise the limit or lower the request" $where $name $request $name $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A quantity of Kubernetes as a number, or nothing where it is not a plain one. */}}
{{- define "asd.quantity" -}}
{{- $text := toString . -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- if regexMatch "^[0-9]+([.][0-9]+)?([mkMGT]|[KMGT]i)?$" $text -}}
{{- mulf (float64 (regexFind "^[0-9.]+" $text)) (float64 (get $units (regexFind "[a-zA-Z]+$" $text))) -}}
{{- end -}}
{{- end -}}

{{- define "asd.validateScaling" -}}
{{- range $key := list "router" "gateway" "policy" -}}
{{- $settings := get $.Values $key -}}
{{- $scaling := $settings.autoscaling -}}
{{- if $scaling.enabled -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "%s.autoscaling: minReplicas %d is above maxReplicas %d; raise maxReplicas or lower minReplicas" $key (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- if not (dig "requests" "cpu" "" $settings.resources) -}}
{{- fail (printf "%s.autoscaling: the share of used CPU is of the requested one; set %s.resources.requests.cpu" $key $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Values.manager.enabled -}}
{{- $sleeps := false -}}
{{- range .Values.stages -}}
{{- $stage := include "asd.stage" (dict "root" $ "stage" .) | fromYaml -}}
{{- if $stage.scaleToZero.idleSeconds }}{{ $sleeps = true }}{{ end -}}
{{- end -}}
{{- if not $sleeps -}}
{{- fail "manager.enabled: no stage may sleep, so that there is nothing to manage; set scaleToZero.idleSeconds of a stage, or manager.enabled=false" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "asd.validateAccess" -}}
{{- if and .Values.monitoring.podMonitor.enabled .Values.monitoring.serviceMonitor.enabled -}}
{{- fail "monitoring.podMonitor and monitoring.serviceMonitor: pods would be asked twice; enable one of them" -}}
{{- end -}}
{{- range $key := list "podMonitor" "serviceMonitor" "rules" -}}
{{- if and (get $.Values.monitoring $key).enabled (not $.Values.telemetry.metricsPort) -}}
{{- fail (printf "monitoring.%s: pods serve no metrics; set telemetry.metricsPort, for instance to 9464" $key) -}}
{{- end -}}
{{- end -}}
{{- $tls := .Values.tls -}}
{{- $secrets := $tls.secretNames -}}
{{- if and $tls.enabled (eq $tls.mode "secret") (not $tls.secretName) -}}
{{- $optional := dict "gateway" .Values.gateway.enabled "policy" .Values.policy.enabled "manager" .Values.manager.enabled -}}
{{- range $key := list "router" "gateway" "policy" "stages" "manager" "client" -}}
{{- if and (dig $key true $optional) (not (get $secrets $key)) -}}
{{- fail (printf "tls: there is no Secret for %s; set tls.secretName or tls.secretNames.%s, or let cert-manager make them with tls.mode=certManager" $key $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $tls.enabled (eq $tls.mode "certManager") -}}
{{- $given := list -}}
{{- if $tls.secretName }}{{ $given = append $given "tls.secretName" }}{{ end -}}
{{- range $key, $value := $secrets -}}
{{- if $value }}{{ $given = append $given (printf "tls.secretNames.%s" $key) }}{{ end -}}
{{- end -}}
{{- if $given -}}
{{- fail (printf "%s: with tls.mode=certManager the release names its Secrets itself; leave it empty, or set tls.mode=secret" (first $given)) -}}
{{- end -}}
{{- end -}}
{{- if and (or $tls.mutual $tls.clientCertificates) (not $tls.enabled) -}}
{{- fail (printf "tls.%s: there are no certificates without TLS; set tls.enabled=true, or tls.%s=false" (ternary "mutual" "clientCertificates" $tls.mutual) (ternary "mutual" "clientCertificates" $tls.mutual)) -}}
{{- end -}}
{{- $named := $tls.secretName -}}
{{- range $secret := $secrets }}{{ $named = or $named $secret }}{{ end -}}
{{- if and $named (not $tls.enabled) -}}
{{- fail (printf "tls: a Secret is named (%s), and connections would be plain all the same; set tls.enabled=true, or leave tls.secretName and tls.secretNames empty" $named) -}}
{{- end -}}
{{- if and .Values.auth.secretName (not .Values.auth.enabled) -}}
{{- fail (printf "auth: a Secret is named (%s), and the router would answer everybody all the same; set auth.enabled=true, or leave auth.secretName empty" .Values.auth.secretName) -}}
{{- end -}}
{{- if and .Values.auth.enabled (not .Values.auth.secretName) -}}
{{- fail "auth.secretName: the router needs a Secret with the tokens; set auth.secretName, or auth.enabled=false" -}}
{{- end -}}
{{- include "asd.validateWayIn" (dict "root" . "part" "router" "route" "a GRPCRoute" "peers" "clients") -}}
{{- if .Values.gateway.enabled -}}
{{- include "asd.validateWayIn" (dict "root" . "part" "gateway" "route" "an HTTPRoute" "peers" "gatewayClients") -}}
{{- end -}}
{{- end -}}

{{/*
How clients outside the cluster reach a part: dict "root" $ "part" "router" "route" its kind of route "peers" the
entry of networkPolicy with its callers.
*/}}
{{- define "asd.validateWayIn" -}}
{{- $part := .part -}}
{{- $settings := get .root.Values $part -}}
{{- if and $settings.ingress.enabled $settings.route.enabled -}}
{{- fail (printf "%s.ingress and %s.route: both lead to the %s; enable one of them" $part $part $part) -}}
{{- end -}}
{{- if and $settings.ingress.enabled (not $settings.ingress.host) -}}
{{- fail (printf "%s.ingress.host: an Ingress needs a host name; set %s.ingress.host" $part $part) -}}
{{- end -}}
{{- if and $settings.route.enabled (not $settings.route.gateway) -}}
{{- fail (printf "%s.route.gateway: %s belongs to a Gateway; set %s.route.gateway to its name" $part .route $part) -}}
{{- end -}}
{{- if and .root.Values.tls.clientCertificates (or $settings.ingress.enabled $settings.route.enabled) -}}
{{- fail (printf "tls.clientCertificates: an Ingress or a Gateway ends the clients' TLS and shows no certificate of theirs; set tls.clientCertificates=false, or let clients reach the %s's Service" $part) -}}
{{- end -}}
{{- $isOutside := or $settings.ingress.enabled $settings.route.enabled (has $settings.service.type (list "NodePort" "LoadBalancer")) -}}
{{- if and .root.Values.networkPolicy.enabled $isOutside (not (get .root.Values.networkPolicy .peers)) -}}
{{- fail (printf "networkPolicy.%s: the %s is reached from outside its namespace (service type, ingress or route), which the policy would deny; name who may call it" .peers $part) -}}
{{- end -}}
{{- end -}}

{{/* dict "root" $ "index" its place "name" its name "stage" its settings. */}}
{{- define "asd.validateStage" -}}
{{- $name := .name -}}
{{- $stage := .stage -}}
{{- $model := $stage.model -}}
{{- $gpus := int $stage.gpus -}}
{{- include "asd.validateRequests" (dict "where" (printf "stages: %q" $name) "resources" ($stage.resources | default dict)) -}}
{{- $section := $model.engine | camelcase | untitle -}}
{{- $parallel := dig $section "tensorParallel" 1 $model | int -}}
{{- if not $model.engine -}}
{{- fail (printf "stages: %q has no engine; set model.engine to onnx, vllm or tensorrt_llm" $name) -}}
{{- end -}}
{{- if eq $model.engine "onnx" -}}
{{- if $gpus -}}
{{- fail (printf "stages: %q asks for GPUs, and the engine onnx computes on CPUs; set model.engine to vllm or tensorrt_llm, or gpus to 0" $name) -}}
{{- end -}}
{{- else -}}
{{- if not $gpus -}}
{{- fail (printf "stages: %q has the engine %s and no GPU; set gpus to %d, its model.%s.tensorParallel" $name $model.engine $parallel $section) -}}
{{- end -}}
{{- if mod $gpus $parallel -}}
{{- fail (printf "stages: %q has gpus %d, which model.%s.tensorParallel %d does not divide; set gpus to %d" $name $gpus $section $parallel $parallel) -}}
{{- end -}}
{{- if ne $gpus $parallel -}}
{{- fail (printf "stages: %q has gpus %d and model.%s.tensorParallel %d, so that %d would be idle; make them equal, and use replicas for further copies" $name $gpus $section $parallel (sub $gpus $parallel)) -}}
{{- end -}}
{{- if and (gt $parallel 1) (not $stage.sharedMemory) -}}
{{- fail (printf "stages: %q is tensor-parallel, and its processes need more than 64 MiB of shared memory; set sharedMemory, for instance to 8Gi" $name) -}}
{{- end -}}
{{- if eq $model.engine "vllm" -}}
{{- $inside := toString $model.vllm.verifyInside -}}
{{- $longest := int ($model.vllm.maxModelLen | default $model.maxModelLen) -}}
{{- $proposed := int $model.vllm.proposedTokens -}}
{{- if and $longest (le $longest $proposed) (or (eq $inside "true") (and (eq $inside "auto") .index)) -}}
{{- fail (printf "stages: %q would propose nothing: model.vllm.maxModelLen %d must exceed model.vllm.proposedTokens %d by the tokens of a prompt; raise maxModelLen, lower proposedTokens, or set model.vllm.verifyInside=false" $name $longest $proposed) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if hasKey (dig "limits" dict ($stage.resources | default dict)) $stage.gpuResource -}}
{{- fail (printf "stages: %q names %s in resources.limits; say how many with gpus instead" $name $stage.gpuResource) -}}
{{- end -}}
{{- if and $model.cache.claim $model.cache.size -}}
{{- fail (printf "stages: %q names a claim for its cache, and a size for a new one; leave model.cache.claim or model.cache.size empty" $name) -}}
{{- end -}}
{{- $update := $stage.updateStrategy -}}
{{- if not (or $update.maxUnavailable $update.maxSurge) -}}
{{- fail (printf "stages: %q could never be updated; set updateStrategy.maxSurge or updateStrategy.maxUnavailable to 1" $name) -}}
{{- end -}}
{{- $scaling := $stage.autoscaling -}}
{{- $sleep := $stage.scaleToZero -}}
{{- if and $scaling.enabled $sleep.idleSeconds -}}
{{- fail (printf "stages: %q is scaled by KEDA and by the manager; set autoscaling.enabled=false, or scaleToZero.idleSeconds=0" $name) -}}
{{- end -}}
{{- if $sleep.idleSeconds -}}
{{- if not .root.Values.manager.enabled -}}
{{- fail (printf "stages: %q may sleep, and nobody would wake it; set manager.enabled=true, or scaleToZero.idleSeconds=0" $name) -}}
{{- end -}}
{{- if gt (int $sleep.minReplicas) (int $sleep.wakeReplicas) -}}
{{- fail (printf "stages: %q sleeps with %d pods and wakes to %d; raise scaleToZero.wakeReplicas, or lower scaleToZero.minReplicas" $name (int $sleep.minReplicas) (int $sleep.wakeReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if $scaling.enabled -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "stages: %q: autoscaling.minReplicas %d is above autoscaling.maxReplicas %d; raise maxReplicas or lower minReplicas" $name (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- if not $scaling.prometheusAddress -}}
{{- fail (printf "stages: %q is scaled by its queue, which KEDA reads from Prometheus; set autoscaling.prometheusAddress, for instance to http://prometheus.monitoring:9090" $name) -}}
{{- end -}}
{{- if not (or $scaling.query .root.Values.telemetry.metricsPort) -}}
{{- fail (printf "stages: %q is scaled by a metric that its pods do not serve; set telemetry.metricsPort, for instance to 9464, or a query of your own in autoscaling.query" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
