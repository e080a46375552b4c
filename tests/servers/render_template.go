// Ollama's own template package as a program: what a real server's template engine makes of a
// template and messages, thousands of times a second.
//
// Reads {"template": ..., "messages": [...], "think": ...} from each line, and answers each with a
// line {"text": ...}, {"parse": "why it does not parse"} or {"execute": "why it fails"}.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/template"
)

type request struct {
	Template string        `json:"template"`
	Messages []api.Message `json:"messages"`
	Think    *bool         `json:"think"`
}

func render(r request) (stage, text string) {
	stage = "parse"
	defer func() {
		if p := recover(); p != nil {
			text = fmt.Sprint(p)
		}
	}()
	t, err := template.Parse(r.Template)
	if err != nil {
		return "parse", err.Error()
	}
	stage = "execute"
	values := template.Values{Messages: r.Messages, IsThinkSet: r.Think != nil}
	if r.Think != nil {
		values.Think = *r.Think
	}
	var b bytes.Buffer
	if err := t.Execute(&b, values); err != nil {
		return "execute", err.Error()
	}
	return "text", b.String()
}

func main() {
	in := bufio.NewReader(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		var r request
		if err := json.Unmarshal(line, &r); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		stage, text := render(r)
		if err := out.Encode(map[string]string{stage: text}); err != nil {
			os.Exit(1)
		}
	}
}
